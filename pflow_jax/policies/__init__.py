"""Policies: network-free velocity fields predicted by one evaluation of the student."""

from pflow_jax.policies.arc import ArcPolicy as ArcPolicy
from pflow_jax.policies.base import Policy as Policy
from pflow_jax.policies.dx import DXPolicy as DXPolicy
from pflow_jax.policies.gmflow import GMFlowPolicy as GMFlowPolicy
from pflow_jax.policies.transforms import auto_temperature as auto_temperature
from pflow_jax.policies.transforms import dropout as dropout
from pflow_jax.policies.transforms import temperature as temperature
