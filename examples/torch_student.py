r"""Samples of an exported student with PyTorch and diffusers alone: no JAX, and nothing of pflow_jax.

    python examples/torch_student.py --student STUDENT --base FLUX.1-dev --noise samples.npz --nfe 4 --out x0.npy \
        --vae FLUX.1-dev/vae
    python examples/torch_student.py --student STUDENT --noise noise.npy --labels 3,7 --nfe 1 --out x0.npy

It is also the description of the format. A student is a folder of

* config.json: "_class_name", one of STUDENTS below, the backbone's fields as diffusers names them, and the fields of
  the output layers (num_gaussians or, for DX, out_channels; constant_logstd, ...);
* diffusion_pytorch_model.safetensors, or shards with an index. Its metadata holds "policy_config", JSON such as
  {"type": "DX", "segment_size": 0.2857, "shift": 3.2}, and, where pflow_jax wrote it, "sampling", such as
  {"nfe": 4, "final_scale": 0.5, "shift": 3.2, "temperature": "auto", "release": "lakonlab-0.2"}. An adapter has
  low-rank updates
  "LAYER.lora_A.weight" (r, in) and "LAYER.lora_B.weight" (out, r), to be added as they are (alpha = r), and tensors
  that replace those of the base. A full model has every tensor and needs no base. A prefix "transformer." is dropped.

A flow map (Align Your Flow, arXiv:2506.14603) has no policy. It is an adapter like the others, or a full model, of the
class "FlowMap" + the backbone's. Its network is the backbone and an embedding of the length t - s of a jump, which is
added to that of t: sinusoids of the length itself (not of 1000 times it), Linear, SiLU, Linear, the tensors
"time_text_embed.length_embedder.linear_1.weight" and so on. One evaluation jumps from t to s: x + (s - t) F(x, t, s).
Its metadata holds "flow_map", such as {"objective": "ayf_emd", "shift": 3.2, "guidance": [2.0, 5.0], "strength": 4.0}:
with "guidance", the lowest and highest strength of training, it takes a strength too. FLUX.1-dev has an input for that;
else there is an embedding "guidance_embedder" like that of the length.

Arrays on disk are channels last: noise.npy (B, H, W, C), x0.npy likewise; cond.npz has text (B, L, D), mask (B, L) and
pooled (B, P), as far as the network reads them; the samples.npz of `pflow sample` has them all. In here they are
(B, C, H, W). With x a state, t its noise level (1 is noise, 0 data) and v a velocity, x - t v is the data end of a
straight path.

Rollouts are those of the PyTorch releases: Euler steps in π-Flow (arXiv:2510.14974), 128 for a unit of schedule time, a
closed form in ArcFlow (arXiv:2602.09014). π-Flow rounded their number to the nearest in its versions 0.1 ("piflow-0.1")
and rounds it up since LakonLab 0.2 ("lakonlab-0.2"), the default without metadata. pflow_jax has better rollouts for
GMFlow and DX; with `--config.sample.method=lakonlab-0.2` (or piflow-0.1, as the metadata say) its `pflow sample` takes
the same steps and draws the same samples from the same noise, whatever the policy. This script needs torch, diffusers
(tried with 0.42), safetensors, numpy and Pillow.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import json
import math
import pathlib

import diffusers
import numpy as np
import torch
from diffusers.models import embeddings
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = "diffusion_pytorch_model.safetensors"

# A student's class: its backbone's class in diffusers, and its policy. π-Flow's own DX files name the backbone alone.
FLUX, QWEN, DIT = "FluxTransformer2DModel", "QwenImageTransformer2DModel", "DiTTransformer2DModel"
KINDS = {"GM": "GMFlow", "DX": "DX", "": "DX", "Arc": "ArcFlow"}
STUDENTS = {prefix + backbone: (backbone, kind) for backbone in (FLUX, QWEN) for prefix, kind in KINDS.items()}
STUDENTS |= {"FlowMap" + backbone: (backbone, "FlowMap") for backbone in (FLUX, QWEN)}
STUDENTS |= {"GM" + DIT + "V2": (DIT, "GMFlow"), "DX" + DIT: (DIT, "DX"), "Arc" + DIT: (DIT, "ArcFlow")}


# ---- Policies: velocities predicted by one evaluation of the network, at the state x_s and the noise level t_s ----


class GMFlow:
  """A Gaussian mixture over the data, one categorical a pixel.

  Args:
    x_s: state, (B, C, H, W).
    t_s: its noise level.
    means: the components' means, as velocities, (B, K, C, H, W).
    logits: of the components' weights, (B, K, 1, H, W).
    log_std: log of the components' standard deviation, as velocities, (B, 1, 1, 1, 1).
    eps: lower bound of noise levels.
  """

  def __init__(self, x_s, t_s, means, logits, log_std, *, eps=1e-6):
    self.x_s, self.t_s, self.eps = x_s, t_s, eps
    self.means = x_s[:, None] - t_s * means
    self.logits = logits.log_softmax(1)
    self.variance = (2 * log_std).exp() * t_s**2

  def posterior_mean(self, x: Tensor, t: float) -> Tensor:
    """E[x0 | x at t, x_s at t_s]: both states are Gaussian observations of x0; the mixture already includes x_s."""
    t, t_s = max(t, self.eps), max(self.t_s, self.eps)
    rho, rho_s = (1 - t) / t, (1 - t_s) / t_s
    zeta = rho**2 - rho_s**2
    nu = ((rho / t) * x - (rho_s / t_s) * self.x_s)[:, None]
    scale = (self.variance * zeta + 1).clamp(min=self.eps)
    fit = (self.means * (nu / scale) - (0.5 * zeta / scale) * self.means**2).sum(2, keepdim=True)
    weights = (self.logits + fit).softmax(1)
    return ((self.variance * nu + (weights * self.means).sum(1, keepdim=True)) / scale)[:, 0]

  def velocity(self, x: Tensor, t: float) -> Tensor:
    return (x - self.posterior_mean(x, t)) / max(t, self.eps)

  def temper(self, temperature: float) -> GMFlow:
    """Returns the policy with a sharper mixture."""
    sharper = copy.copy(self)
    sharper.logits = (self.logits / temperature).log_softmax(1)
    sharper.variance = self.variance * temperature
    return sharper


class DX:
  """Data that depend on time alone: a curve in schedule time through N denoised states.

  Args:
    x_s: state, (B, C, H, W).
    t_s: its noise level.
    coefficients: velocities, (B, N, C, H, W). "grid": towards states on an even grid over the segment, the first at its
      end; "polynomial": coefficients of the powers of the schedule time since the source.
    segment_size: of training; it stays when a student is sampled with another grid.
    shift: of training; it stays when a student is sampled with another grid.
    mode: "grid" or "polynomial".
    compat: reading of a polynomial: with x_s in every coefficient like the release, or (False) in the first alone.
    eps: lower bound of the segment.
  """

  def __init__(self, x_s, t_s, coefficients, *, segment_size=1.0, shift=1.0, mode="grid", compat=True, eps=1e-4):
    if mode not in ("grid", "polynomial"):
      raise ValueError(f'policy_config: expected the mode "grid" or "polynomial", got {mode!r}')
    self.states, self.mode, self.shift, self.eps = x_s[:, None] - t_s * coefficients, mode, shift, eps
    if mode == "polynomial" and not compat:
      self.states[:, 1:] -= x_s[:, None]
    self.r_s = unshift_time(t_s, shift)
    self.r_d = max(self.r_s - segment_size, 0.0)

  def posterior_mean(self, x: Tensor, t: float) -> Tensor:
    r, n = unshift_time(t, self.shift), np.arange(self.states.shape[1])
    if self.mode == "polynomial":
      weights = (self.r_s - r) ** n
    else:  # linear between neighbours
      place = np.clip((r - self.r_d) / max(self.r_s - self.r_d, self.eps), 0, 1) * n[-1]
      weights = np.clip(1 - np.abs(place - n), 0, 1)
    return torch.einsum("n,bn...->b...", torch.as_tensor(weights).to(self.states), self.states)

  def velocity(self, x: Tensor, t: float) -> Tensor:
    return (x - self.posterior_mean(x, t)) / max(t, self.eps)

  def temper(self, temperature: float) -> DX:
    return self


class ArcFlow:
  """A mixture of velocities that grow or decay: v(t) = sum_k w_k v_k exp(g_k (t_s - t)), g_0 = 0.

  Args:
    x_s: state, (B, C, H, W).
    t_s: its noise level.
    velocities: v_k, (B, K, C, H, W).
    logits: of the w_k, (B, K, 1, H, W).
    log_gammas: the g_k but the first, (B, K - 1, 1, H, W).
  """

  def __init__(self, x_s, t_s, velocities, logits, log_gammas):
    self.t_s, self.velocities, self.logits = t_s, velocities, logits
    self.gammas = torch.cat([torch.zeros_like(logits[:, :1]), log_gammas], 1)

  def velocity(self, x: Tensor, t: float) -> Tensor:
    return (self.logits.softmax(1) * (self.gammas * (self.t_s - t)).exp() * self.velocities).sum(1)

  def integrate(self, x: Tensor, t: float, s: float) -> Tensor:
    """The state at noise level s, from x at t."""
    z = self.gammas * (t - s)
    mean_growth = torch.where(z.abs() < 1e-6, 1 + z / 2, torch.expm1(z) / torch.where(z == 0, 1.0, z))
    growth = (self.gammas * (self.t_s - t)).exp() * (t - s) * mean_growth
    return x - (self.logits.softmax(1) * growth * self.velocities).sum(1)

  def temper(self, temperature: float) -> ArcFlow:
    sharper = copy.copy(self)
    sharper.logits = self.logits / temperature
    return sharper


class FlowMap:
  """The average velocity of a jump, (B, 1, C, H, W)."""

  def __init__(self, x_s, t_s, average):
    self.x_s, self.t_s, self.average = x_s, t_s, average[:, 0]

  def jump(self, s: float) -> Tensor:
    """The state at noise level s, for which the network was evaluated."""
    return self.x_s + (s - self.t_s) * self.average


Policy = GMFlow | DX | ArcFlow | FlowMap
POLICIES = {"GMFlow": GMFlow, "DX": DX, "ArcFlow": ArcFlow, "FlowMap": FlowMap}


# ---- Sampler ----

# Rounding of a stretch's substeps in the versions of π-Flow.
RELEASES = {"piflow-0.1": round, "lakonlab-0.2": math.ceil}
NEWEST = "lakonlab-0.2"


def shift_time(r: float, shift: float) -> float:
  """Noise level of a schedule time, in which segments and substeps are even."""
  return shift * r / (1 + (shift - 1) * r)


def unshift_time(t: float, shift: float) -> float:
  return t / (shift + (1 - shift) * t)


def rollout(policy, x: Tensor, r: float, r_end: float, shift=1.0, substeps=128, release=NEWEST) -> Tensor:
  """The policy's state at schedule time r_end, from x at r."""
  count = max(RELEASES[release]((r - r_end) * substeps), 1)
  r, r_end = float(r), float(r_end)
  if isinstance(policy, ArcFlow):
    return policy.integrate(x, shift_time(r, shift), shift_time(r_end, shift))
  times = [shift_time(r + (r_end - r) * i / count, shift) for i in range(count + 1)]
  for t, s in itertools.pairwise(times):
    x = x + policy.velocity(x, t) * (s - t)
  return x


@torch.inference_mode()
def sample(
  student, noise, cond, nfe, final_scale=1.0, shift=1.0, temperature=1.0, substeps=128, release=NEWEST
) -> Tensor:
  """Draws samples from noise, both (B, C, H, W).

  Args:
    student: (x, t, cond) -> policy, one network evaluation for each of `nfe` segments.
    noise: states at noise level 1.
    cond: condition, passed on.
    nfe: network evaluations.
    final_scale: length of the last segment over that of the others, in schedule time.
    shift: see `shift_time`.
    temperature: of the mixtures in all segments but the last; "auto" is π-Flow's.
    substeps: Euler steps for a unit of schedule time.
    release: one of RELEASES, which decides their number.
  """
  if release not in RELEASES:
    raise ValueError(f"release: expected one of {list(RELEASES)}, got {release!r}")
  if temperature == "auto":
    temperature = min(max(0.1 * (nfe - 1), 0.0), 1.0)
  # π-Flow's pipelines keep 1000 t in float32: a segment of 64 substeps may come out longer and take 65.
  length = 1 / (nfe - 1 + final_scale)
  t = shift_time(np.array([1 - i * length for i in range(nfe)] + [0], np.float32), shift)
  sources, ends = (unshift_time(u * 1000 / 1000, shift) for u in (t[:-1], t[1:] / (1 - t[1:] + t[1:])))
  x = noise
  for i, (r, r_end) in enumerate(zip(sources, ends, strict=True)):
    policy = student(x, float(t[i]), cond)
    if i < nfe - 1 and temperature < 1:
      policy = policy.temper(max(temperature, 1e-6))
    x = rollout(policy, x, r, r_end, shift, substeps, release)
  return x


@torch.inference_mode()
def sample_flow_map(student, noise, cond, nfe: int, shift=1.0, strength: float | None = None) -> Tensor:
  """Draws samples of a flow map by `nfe` jumps that are even in schedule time, without noise between them.

  Args:
    student: (x, t, cond, s, strength) -> `FlowMap`, one network evaluation.
    noise: states at noise level 1, (B, C, H, W).
    cond: condition, passed on.
    nfe: network evaluations, any number.
    shift: see `shift_time`.
    strength: of guidance; by default that of the student's metadata.
  """
  times = [shift_time(1 - i / nfe, shift) for i in range(nfe)] + [0.0]
  x = noise
  for t, s in itertools.pairwise(times):
    x = student(x, t, cond, s, strength).jump(s)
  return x


# ---- Network: a backbone of diffusers with other output layers ----


class Head(nn.Module):
  """The output layers: tokens (B, T, D) and conditioning embedding (B, D) -> the arguments of a policy.

  A layer's rows, for M maps of C channels and patches of p x p, count ((p1 p + p2) M + m) C + c in a DiT and
  ((m C + c) p + p1) p + p2 in FLUX and Qwen-Image.
  """

  def __init__(self, kind: str, is_dit: bool, config: dict, width: int, channels: int, patch: int):
    super().__init__()
    self.is_dit, self.patch, self.log_std = is_dit, patch, config.get("constant_logstd") if kind == "GMFlow" else None
    count = 1 if kind == "FlowMap" else config.get("num_gaussians")
    if kind == "DX":
      count = (config.get("out_channels") or 0) // config.get("in_channels", 1)
    if not count:
      raise ValueError(f"config.json: expected {'out_channels' if kind == 'DX' else 'num_gaussians'}, got {config}")
    means, logits = ("proj_out_means", count, channels), ("proj_out_logweights", count, 1)
    # Parts of a policy: the layer, its maps M and their channels C.
    self.layers = {
      "GMFlow": {"means": means, "logits": logits},
      "DX": {"coefficients": ("proj_out_2" if is_dit else "proj_out", count, channels)},
      "ArcFlow": {"velocities": means, "logits": logits, "log_gammas": ("proj_out_loggamma", count - 1, 1)},
      "FlowMap": {"average": ("proj_out", 1, channels)},
    }[kind]
    for name, maps, size in self.layers.values():
      self.add_module(name, nn.Linear(width, patch**2 * maps * size))
    if kind == "GMFlow" and self.log_std is None:
      inner = [config.get("logstd_inner_dim", 1024)] * (config.get("gm_num_logstd_layers", 2) - 1)
      pairs = [(nn.SiLU(), nn.Linear(*sizes)) for sizes in itertools.pairwise([width, *inner, 1])]
      self.proj_out_logstds = nn.Sequential(*itertools.chain(*pairs))

  def _maps(self, name: str, maps: int, size: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Puts the rows of a layer in space: (B, maps, size, H, W)."""
    (h, w), p, rows = grid, self.patch, getattr(self, name)(tokens)
    if self.is_dit:
      rows = rows.reshape(-1, h, w, p, p, maps, size).permute(0, 5, 6, 1, 3, 2, 4)
    else:
      rows = rows.reshape(-1, h, w, maps, size, p, p).permute(0, 3, 4, 1, 5, 2, 6)
    return rows.reshape(-1, maps, size, h * p, w * p)

  def forward(self, tokens: Tensor, embedding: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    outputs = {name: self._maps(*layer, tokens, grid) for name, layer in self.layers.items()}
    if hasattr(self, "proj_out_logstds"):
      outputs["log_std"] = self.proj_out_logstds(embedding).reshape(-1, 1, 1, 1, 1)
    elif self.log_std is not None:
      outputs["log_std"] = torch.full_like(embedding[:, :1, None, None, None], self.log_std)
    return outputs


class Student(nn.Module):
  """One network evaluation: x (B, C, H, W), its noise level t and the condition -> a policy, in float32.

  The condition is {"text": (B, L, D), "pooled": (B, P)} for FLUX, {"text", "mask": (B, L)} for Qwen-Image, labels (B,)
  for a DiT. A flow map takes the noise level s that it jumps to, and perhaps a strength of guidance.
  """

  def __init__(self, net: nn.Module, kind: str, config: dict, options: dict, sampling: dict):
    super().__init__()
    self.net, self.kind, self.options, self.sampling, self.backbone = net, kind, options, sampling, type(net).__name__
    is_dit = self.backbone == DIT
    # FLUX and Qwen-Image get patches of 2 x 2 latents, which diffusers counts among the channels.
    self.patch = net.config.patch_size if is_dit else 2
    self.channels = net.config.in_channels if is_dit else net.config.in_channels // 4
    self.head = Head(kind, is_dit, config, net.inner_dim, self.channels, self.patch)
    self.strength = sampling.get("strength", 3.5)
    if kind == "FlowMap":
      # Embeddings that the backbone lacks, in float32 and under the names that they have in the files.
      has_input = net.config.get("guidance_embeds", False)
      names = ["length_embedder"] + ["guidance_embedder"] * ("guidance" in sampling and not has_input)
      branches = {name: embeddings.TimestepEmbedding(256, net.inner_dim) for name in names}
      self.head.time_text_embed = nn.ModuleDict(branches)
      net.time_text_embed.register_forward_hook(lambda layer, args, y: (y.float() + self.added).to(y.dtype))
    self.time_scale = config.get("num_timesteps", 1000)  # of a DiT: factor on t
    self.flip_time = config.get("flip_model_timesteps", False)  # of a DiT: its time is 1 - t
    if is_dit:
      for block in net.transformer_blocks:  # frequencies of the original DiT, unless the config names diffusers' own
        shift = config.get("frequency_shift", 0)
        block.norm1.emb.time_proj = embeddings.Timesteps(256, True, downscale_freq_shift=shift)
      net.proj_out_2 = nn.Identity()
    else:
      net.proj_out = nn.Identity()
      net.norm_out.register_forward_pre_hook(self._keep_embedding)

  def _keep_embedding(self, norm: nn.Module, args: tuple[Tensor, Tensor]) -> None:
    self.embedding = args[1]  # the log-std reads the last norm's input, before any SiLU

  def _embed(self, name: str, value: float, like: Tensor) -> Tensor:
    """An embedding (B, D) of one number, if the student has it, else zeros."""
    branches = self.head.time_text_embed
    if name not in branches:
      return torch.zeros((), device=like.device)
    numbers = torch.full((len(like),), value, device=like.device)
    return branches[name](embeddings.get_timestep_embedding(numbers, 256, True, downscale_freq_shift=0))

  def forward(self, x: Tensor, t: float, cond, s: float = 0.0, strength: float | None = None) -> Policy:
    (batch, channels, height, width), p = x.shape, self.patch
    if channels != self.channels or height % p or width % p:
      wanted = f"({self.channels}, H, W) with H and W multiples of {p}"
      raise ValueError(f"noise: expected {wanted}, got {(channels, height, width)}")
    grid, time = (height // p, width // p), torch.full((batch,), t, device=x.device)
    self.asked = self.strength if strength is None else strength
    if self.kind == "FlowMap":
      self.added = self._embed("length_embedder", t - s, x) + self._embed("guidance_embedder", self.asked, x)
    if self.backbone == DIT:
      tokens = self._dit(x.to(self.net.dtype), self.time_scale * (1 - time if self.flip_time else time), cond, grid)
    else:
      img = x.reshape(batch, channels, grid[0], p, grid[1], p).permute(0, 2, 4, 1, 3, 5)
      img = img.reshape(batch, grid[0] * grid[1], channels * p * p).to(self.net.dtype)
      tokens = (self._flux if self.backbone == FLUX else self._qwen)(img, time, cond, grid)
    outputs = self.head(tokens.float(), self.embedding.float(), grid)
    return POLICIES[self.kind](x, t, **outputs, **self.options)

  def _dit(self, x: Tensor, time: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    places = torch.stack(torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[0]), indexing="xy")).float()
    positions = embeddings.get_2d_sincos_pos_embed_from_grid(self.net.inner_dim, places, output_type="pt")
    tokens = self.net.pos_embed.proj(x).flatten(2).transpose(1, 2) + positions.to(x)
    for block in self.net.transformer_blocks:
      tokens = block(tokens, timestep=time, class_labels=labels)
    self.embedding = self.net.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=x.dtype)
    shift, scale = self.net.proj_out_1(F.silu(self.embedding))[:, None].chunk(2, -1)
    return self.net.norm_out(tokens) * (1 + scale) + shift

  def _flux(self, img: Tensor, time: Tensor, cond: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    """Attends to every text token, padding too; the backbone multiplies time and guidance by 1000."""
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1])).to(time)
    text_ids = torch.zeros_like(ids[:1]).expand(cond["text"].shape[1], 3)
    guidance = torch.full_like(time, self.asked) if self.net.config.guidance_embeds else None
    inputs = dict(hidden_states=img, timestep=time, img_ids=ids, txt_ids=text_ids, guidance=guidance)
    text, pooled = cond["text"].to(img), cond["pooled"].to(img)
    return self.net(**inputs, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]

  def _qwen(self, img: Tensor, time: Tensor, cond: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    mask = cond["mask"].bool()
    longest = int(mask.sum(1).max())
    inputs = dict(hidden_states=img, timestep=time, img_shapes=[[(1, *grid)]] * len(img))
    text = dict(encoder_hidden_states=cond["text"][:, :longest].to(img), encoder_hidden_states_mask=mask[:, :longest])
    return self.net(**inputs, **text, return_dict=False)[0]


# ---- Files ----


def read_config(folder: pathlib.Path) -> dict:
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder}: expected a folder with config.json and {WEIGHTS}")
  return json.loads((folder / "config.json").read_text())


def read_tensors(folder: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Reads tensors and metadata of a folder's safetensors, in one file or in shards."""
  index, tensors, metadata = folder / f"{WEIGHTS}.index.json", {}, {}
  names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WEIGHTS}
  for name in sorted(names):
    if not (folder / name).is_file():
      raise ValueError(f"{folder}: expected the file {name} in it")
    try:
      with safe_open(folder / name, "pt") as file:
        metadata |= file.metadata() or {}
        tensors |= {key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
      raise ValueError(f"{folder / name}: {error}") from None
  return tensors, metadata


def read_base(folder: pathlib.Path, backbone: str, dtype: torch.dtype) -> nn.Module:
  """Loads a backbone from a diffusers folder: its own, or that of a pipeline around it."""
  folder = folder if (folder / "config.json").is_file() else folder / "transformer"
  if read_config(folder).get("_class_name") != backbone:
    raise ValueError(f"--base {folder}: expected a {backbone}, got a {read_config(folder).get('_class_name')}")
  net, info = getattr(diffusers, backbone).from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
  if any(info.values()):
    raise ValueError(f"--base {folder}: its tensors are not those of its config.json: {info}")
  return net


def load_student(folder, base=None, dtype: torch.dtype = torch.float32, **fields) -> Student:
  """Loads the student in `folder`: an adapter on the backbone in the folder `base`, or a full model.

  Args:
    folder: of the student.
    base: folder of the backbone.
    dtype: of the parameters.
    **fields: fields that config.json lacks.

  Raises:
    ValueError: a file does not fit; the message has all tensors that are missing, unexpected or mis-shaped.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder) | fields
  name = config.get("_class_name")
  if name not in STUDENTS:
    raise ValueError(f"{folder}/config.json: expected a _class_name among {sorted(STUDENTS)}, got {name!r}")
  backbone, kind = STUDENTS[name]
  tensors, metadata = read_tensors(folder)
  if kind == "FlowMap":
    options, sampling = {}, read_flow_map(metadata, folder)
  else:
    options, sampling = read_policy(kind, name, metadata, folder)
  if base is None:
    model = getattr(diffusers, backbone)
    names = set(inspect.signature(model.__init__).parameters) - {"out_channels"}
    net = model(**{key: value for key, value in config.items() if key in names})
  else:
    net = read_base(pathlib.Path(base), backbone, dtype)
  student = Student(net, kind, config, options, sampling)
  fill(student, tensors, folder, dtype, complete=base is None)
  return student.eval().requires_grad_(False)


def read_flow_map(metadata: dict[str, str], folder: pathlib.Path) -> dict:
  """Reads how a flow map is sampled: its shift and, if it takes strengths, their bounds and its own."""
  stated = json.loads(metadata.get("flow_map", "{}"))
  if "shift" not in stated:
    raise ValueError(f"{folder}/{WEIGHTS}: expected the metadata flow_map of a flow map, got {sorted(metadata)}")
  return {key: stated[key] for key in ("shift", "guidance", "strength") if stated.get(key) is not None}


def read_policy(kind: str, name: str, metadata: dict[str, str], folder: pathlib.Path) -> tuple[dict, dict]:
  """Reads the options of a policy, and how it is sampled."""
  options = json.loads(metadata.get("policy_config", "{}"))
  known = set(inspect.getfullargspec(POLICIES[kind]).kwonlydefaults or ())
  if options.pop("type", None) != kind or not set(options) <= known:
    raise ValueError(
      f'{folder}/{WEIGHTS}: expected the metadata policy_config {{"type": "{kind}", ...}} of a {name}, '
      f"got {metadata.get('policy_config', 'none: it is no student')}"
    )
  # Files without a release are of earlier versions of pflow_jax, which took the steps of π-Flow 0.1.
  sampling = {"release": "piflow-0.1"} | json.loads(metadata["sampling"]) if "sampling" in metadata else {}
  return options, sampling


def fill(student: Student, tensors: dict[str, Tensor], folder: pathlib.Path, dtype, complete: bool) -> None:
  """Puts a folder's tensors in a student: all of the head's and, if `complete`, all of the backbone's."""
  net, head, body = student.net, student.head.state_dict(), student.net.state_dict()
  for name in [name for name in tensors if name.startswith("emb.")]:  # DiT: one embedding; diffusers has one a block
    tensors |= {f"transformer_blocks.{i}.norm1.{name}": tensors[name] for i in range(len(net.transformer_blocks))}
    del tensors[name]
  shapes = {name: tuple(tensor.shape) for name, tensor in (body | head).items()}
  layers = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
  for name in layers:
    if len(shapes.get(f"{name}.weight", ())) == 2:
      (rows, columns), parts = shapes[f"{name}.weight"], [key for key in tensors if key.startswith(f"{name}.lora_")]
      rank = min(min(tensors[key].shape) for key in parts)
      shapes |= {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}
  needed = [name for name in shapes if complete or name not in body]
  problems = [f"missing: {name} {shapes[name]}" for name in needed if name not in tensors]
  for name, tensor in tensors.items():
    if shapes.get(name) != tuple(tensor.shape):
      expected = f"expected {shapes[name]}" if name in shapes else "unexpected"
      problems.append(f"{expected}: {name} {tuple(tensor.shape)}")
  if problems:
    hint = " (an adapter needs --base)" if complete else ""
    raise ValueError(f"{folder}: {len(problems)} tensors do not fit config.json{hint}\n  " + "\n  ".join(problems))
  student.head.load_state_dict({name: tensors[name].float() for name in head})
  net.load_state_dict({k: v.to(dtype) for k, v in tensors.items() if k in body}, strict=False, assign=True)
  for name in layers:
    layer = net.get_submodule(name)
    for part in ("lora_A", "lora_B"):
      layer.register_buffer(part, tensors[f"{name}.{part}.weight"].to(dtype))
    layer.register_forward_hook(lambda layer, args, y: y + args[0] @ layer.lora_A.T @ layer.lora_B.T)


def load_condition(student: Student, batch: int, labels: list[int], path: str | None) -> Tensor | dict[str, Tensor]:
  """Makes the condition of the network: labels, repeated, or the arrays of an .npz."""
  if student.backbone == DIT:
    classes = student.net.config.num_embeds_ada_norm
    if not labels or not all(0 <= label <= classes for label in labels):
      raise ValueError(f"--labels: expected classes in [0, {classes}], such as 3,7, got {labels}")
    return torch.tensor(labels)[torch.arange(batch) % len(labels)]
  arrays, needed = {}, ("text", "pooled") if student.backbone == FLUX else ("text", "mask")
  for name, array in np.load(path).items() if path else ():
    if name not in needed:
      continue
    raw = array.dtype.kind == "V"  # bfloat16 is unknown to NumPy
    arrays[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if raw else torch.from_numpy(array)
  if any(name not in arrays or len(arrays[name]) != batch for name in needed):
    got = {name: tuple(array.shape) for name, array in arrays.items()}
    raise ValueError(f"--cond: expected {' and '.join(needed)} of {batch} samples, got {got or 'none'}")
  return {name: arrays[name] for name in needed}


def decode(latents: Tensor, folder: pathlib.Path) -> np.ndarray:
  """Decodes to pictures (B, H, W, 3) uint8, with the AutoencoderKL or AutoencoderKLQwenImage in `folder`."""
  vae = getattr(diffusers, read_config(folder)["_class_name"]).from_pretrained(folder).to(latents.device)
  video = "temperal_downsample" in vae.config  # Qwen-Image's: (B, C, 1, H, W), normalised channel by channel
  if video:
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).to(latents)[:, None, None] for name in ("mean", "std"))
    latents = (latents * std + mean)[:, :, None]
  else:
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
  with torch.inference_mode():
    pictures = torch.cat([vae.decode(one[None]).sample for one in latents])
  pictures = pictures[:, :, 0] if video else pictures
  return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--student", required=True, help="folder of the student")
  add("--base", help="folder of the backbone that an adapter is for, or of the pipeline around it")
  add("--noise", required=True, help="standard normal latents, .npy (B, H, W, C) or .npz with them and the condition")
  add("--cond", help=".npz with text and pooled (FLUX), or text and mask (Qwen-Image); default: --noise")
  add("--labels", default="", help="classes for a DiT, repeated, such as 3,7")
  add("--nfe", type=int, help="network evaluations; by default, as the next four, those in the student's metadata")
  add("--final_scale", type=float, help="length of the last segment; without metadata 1 for ArcFlow and DiT, else 0.5")
  add("--shift", type=float, help="time shift; without metadata 1 for DiT, else 3.2")
  add("--temperature", help='a number, or "auto"; without metadata that for GMFlow, but 1 for DiT')
  add("--strength", type=float, help="of guidance, of a flow map that was trained for several; default: its teacher's")
  add("--release", choices=RELEASES, help=f"version of π-Flow whose steps are taken; without metadata {NEWEST}")
  add("--substeps", type=int, default=128, help="Euler steps for a unit of schedule time")
  add("--num_timesteps", type=float, help="factor on t in a DiT without it: 1 for π-Flow's gmrepa students, else 1000")
  add(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16", "float16"),
    help="of the backbone; policies are float32",
  )
  add("--device", default="cpu")
  add("--out", required=True, help="samples, .npy (B, H, W, C)")
  add("--vae", type=pathlib.Path, help="folder of the decoder, for a .png beside the samples")
  args = parser.parse_args(argv)
  try:
    fields = {} if args.num_timesteps is None else {"num_timesteps": args.num_timesteps}
    device, noise = torch.device(args.device), np.load(args.noise)
    kept = args.noise if isinstance(noise, np.lib.npyio.NpzFile) else None
    noise = torch.from_numpy(noise["noise"] if kept else noise).float().movedim(-1, 1).to(device)
    if args.vae:
      read_config(args.vae)  # before it is needed
    student = load_student(args.student, args.base, getattr(torch, args.dtype), **fields).to(device)
    cond = load_condition(student, len(noise), [int(c) for c in args.labels.split(",") if c], args.cond or kept)
    cond = {k: v.to(device) for k, v in cond.items()} if isinstance(cond, dict) else cond.to(device)
    is_dit = student.backbone == DIT
    grid = dict(final_scale=1.0 if is_dit or student.kind == "ArcFlow" else 0.5, shift=1.0 if is_dit else 3.2)
    grid["temperature"] = "auto" if student.kind == "GMFlow" and not is_dit else 1.0
    temperature = args.temperature if args.temperature in (None, "auto") else float(args.temperature)
    given = dict(nfe=args.nfe, final_scale=args.final_scale, shift=args.shift, temperature=temperature)
    given["release"] = args.release
    grid |= student.sampling | {name: value for name, value in given.items() if value is not None}
    if "nfe" not in grid:
      raise ValueError("--nfe: expected a number of network evaluations, which this student's metadata do not tell")
    low, high = student.sampling.get("guidance", (math.inf, -math.inf))
    if args.strength is not None and not low <= args.strength <= high:
      wanted = f"a strength in [{low}, {high}]" if low <= high else "none for this student"
      raise ValueError(f"--strength: expected {wanted}, got {args.strength}")
    if student.kind == "FlowMap":
      x0 = sample_flow_map(student, noise, cond, grid["nfe"], grid["shift"], args.strength)
    else:
      x0 = sample(student, noise, cond, **grid, substeps=args.substeps)
  except (ValueError, OSError, KeyError, RuntimeError) as error:
    raise SystemExit(f"error: {error}") from None
  np.save(args.out, x0.movedim(1, -1).cpu().numpy())
  if args.vae:
    Image.fromarray(np.concatenate(decode(x0, args.vae), axis=1)).save(pathlib.Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
  main()
