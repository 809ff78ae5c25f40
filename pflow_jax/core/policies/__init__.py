"""Policies: network-free velocity fields predicted by one evaluation of the student."""

from pflow_jax.core.policies.arc import ArcPolicy as ArcPolicy
from pflow_jax.core.policies.base import Policy as Policy
from pflow_jax.core.policies.dx import DXPolicy as DXPolicy
from pflow_jax.core.policies.gmflow import GMFlowPolicy as GMFlowPolicy
from pflow_jax.core.policies.transforms import auto_temperature as auto_temperature
from pflow_jax.core.policies.transforms import dropout as dropout
from pflow_jax.core.policies.transforms import temperature as temperature
