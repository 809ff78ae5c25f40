"""The page as gradio shows it. Importing this module imports gradio."""

from __future__ import annotations

import dataclasses
import functools
import html
import logging
import random
import socket
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from pflow_jax.page import pictures
from pflow_jax.page.drawing import Studio, Wish

EACH = "each in turn"
WAITING = 32  # visitors' wishes that wait for the devices
KEPT_SECONDS = 3600  # what a visitor has drawn, and the picture files of it

INTO_VIEW = "() => document.getElementById('chart').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
TEMPERATURES = ("as trained", *(n / 10 for n in range(10, -1, -1)))
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.title h1 { font-size: 1.35rem; font-weight: 650; margin: 0; }
.title p, .cost, .hint, .unit { opacity: .72; margin: 0; }
.cost { font-size: .8rem; line-height: 1.35; }
.name { font-weight: 600; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em; }
.model { align-items: center; }
.side { gap: 6px !important; min-width: 0 !important; }
.model .side { flex: 0 0 236px !important; }
.plain, .plain .html-container, .side .block, .side .html-container, .side .prose {
  padding: 0 !important; margin: 0 !important; }
.side .row { gap: 8px; align-items: center; flex-wrap: nowrap; }
.side input { padding: 3px 8px !important; }
.buttons { gap: 8px !important; flex: 0 0 130px !important; min-width: 0 !important; justify-content: center; }
.model { margin-top: 2px; }
.nfe { flex: 0 0 84px !important; }
.samples, .samples * { background: transparent !important; border: 0 !important; box-shadow: none !important; }
.samples img { width: 100%; object-fit: contain; image-rendering: pixelated; cursor: crosshair; }
.panel { max-width: 480px; margin: 0 auto; }
.chart svg { width: 100%; height: auto; max-height: 360px; font-family: var(--font); }
.save { display: inline-block; padding: .3rem .8rem; border-radius: var(--radius-md); font-size: .9rem;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color); text-decoration: none; }
.save:hover { background: var(--background-fill-secondary); }
.toast-wrap { top: auto !important; bottom: 1rem !important; }  /* where it covers no button */
@media (max-width: 640px) {
  .model .side, .buttons { flex: 1 1 100% !important; }
  .buttons { flex-direction: row; }
  .model { gap: 6px !important; }
  .figure { overflow-x: auto; max-width: calc(100vw - 4rem); }
  .figure svg { min-width: 560px; }
}
"""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A visitor's last drawing, of which he clicks a sample.

  Attributes:
    wish: its settings.
    grid: places of its pictures.
    points: of every row, in place of pictures.
    limit: of the panels of points.
  """

  wish: Wish
  grid: pictures.Grid | None = None
  points: tuple[np.ndarray, ...] = ()
  limit: float = 1.0


def serve(
  studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> tuple[gr.Blocks, str]:
  """Starts the page in a thread of its own, and shows it where this is a notebook.

  Args:
    studio: what it draws.
    host: address to listen on.
    port: to listen on; by default the first free one from 7860 on.
    share: ask gradio's servers for a public address.

  Returns:
    The page, which `close` ends, and its address.
  """
  page = build(studio)
  page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
  # Letters of this machine; the theme's own would be loaded.
  theme = gr.themes.Default(
    primary_hue="blue", neutral_hue="gray", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
  )
  less: dict[str, Any] = dict(ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False)
  less |= dict(footer_links=[], max_file_size=1)  # bytes: nothing is uploaded
  where: dict[str, Any] = dict(server_name=host, server_port=port, share=share)
  _, local, public = page.launch(prevent_thread_lock=True, quiet=True, theme=theme, css=CSS, **where, **less)
  return page, public or local


def check_place(host: str, port: int | None) -> None:
  """Raises ValueError if nothing can listen there; gradio would try a hundred ports."""
  if port is not None and not 1 <= port <= 65535:  # the system would take the remainder
    raise ValueError(f"port: expected one from 1 to 65535, got {port}")
  try:
    family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as one:
      one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      one.bind(address)
  except (OSError, UnicodeError) as error:  # a name may be none that can be looked up
    reason = error.strerror if isinstance(error, OSError) else error
    raise ValueError(f"host, port: cannot listen on {host}, port {port or 'any'} ({reason})") from error


def build(studio: Studio) -> gr.Blocks:
  """Makes the page."""
  colours = pictures.colours_of([row.is_teacher for row in studio.rows])
  with gr.Blocks(title="pflow demo", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
    gr.HTML(f'<div class="title"><h1>pflow demo</h1><p>{_lead(studio)}</p></div>', elem_classes="plain")
    with gr.Row(equal_height=True):
      what = _what(studio)
      seed = gr.Number(0, label="Seed", precision=0, min_width=100, elem_id="seed")
      sizes = [studio.batch_size * n for n in (1, 2, 4)]
      columns = gr.Radio(
        sizes, value=sizes[0], label="Seeds side by side", visible=not studio.has_points, min_width=230
      )
      has_policy = any(row.has_policy for row in studio.rows)
      temperature = gr.Dropdown(
        TEMPERATURES, label="Temperature", visible=has_policy, min_width=130, elem_id="temperature"
      )
      with gr.Column(min_width=130, scale=0, elem_classes="buttons"):
        draw = gr.Button("Draw", variant="primary", size="md", elem_id="draw")
        another = gr.Button("New seed", size="md", elem_id="new-seed")
    nfe, costs, images = _rows(studio, colours)
    save = gr.HTML(elem_id="save", elem_classes="plain")
    first = "Give a prompt, and draw." if studio.has_prompts else _hint(studio)
    chart = gr.HTML(f'<p class="hint">{first}</p>', elem_classes="chart plain", elem_id="chart")
    shown = gr.State(None, time_to_live=KEPT_SECONDS)

    wished = [what, seed, columns, temperature, *nfe]
    outputs = [shown, save, chart, *costs, *images]

    def drawn(what, seed, columns, temperature, *nfe):
      return draw_rows(studio, colours, wish_of(studio, what, seed, columns, temperature, nfe))

    event: dict[str, Any] = dict(api_visibility="private", concurrency_id="devices", concurrency_limit=1)
    again = [draw.click, seed.submit, *(one.submit for one in nfe)]
    drawing = event | {"show_progress_on": images}
    gr.on([*again, *([what.submit] if studio.has_prompts else [])], told(drawn), wished, outputs, **drawing)
    rolled = another.click(lambda: random.randrange(10**6), None, seed, queue=False, api_visibility="private")
    rolled.then(told(drawn), wished, outputs, **drawing)
    if not studio.has_prompts:
      page.load(told(drawn), wished, outputs, **drawing)
    for index, image in enumerate(images):
      picked = image.select(told(_clicked(studio, colours, index)), shown, chart, **event)
      picked.success(None, None, None, js=INTO_VIEW)
  return page


def wish_of(studio: Studio, what: Any, seed: Any, columns: Any, temperature: Any, nfe: Any) -> Wish:
  """Makes a wish of the values of the page's fields, which may be empty."""
  return Wish(
    nfe=tuple(nfe),
    label=None if studio.has_prompts or what == EACH else what,
    prompt=what or "" if studio.has_prompts else "",
    seed=seed,
    columns=1 if studio.has_points else columns,
    temperature=None if temperature == TEMPERATURES[0] else temperature,
  )


def draw_rows(studio: Studio, colours: list[str], wish: Wish) -> list[Any]:
  """Draws a wish; returns the values of the page's outputs."""
  rows, grid, limit = studio.draw(wish), None, 1.0
  costs = [pictures.cost_of(row) for row in rows]
  if studio.has_points:
    points = tuple(row.x0 for row in rows)
    limit = pictures.limit_of(points[0])
    images = [pictures.panel_of(x, limit, colour) for x, colour in zip(points, colours, strict=True)]
  else:
    points = ()
    strips = [pictures.strip_of(studio.pictures(row.x0)) for row in rows]
    images, grid = [image for image, _ in strips], strips[0][1]
  names = [f"{row.name}, {cost}" for row, cost in zip(studio.rows, costs, strict=True)]
  png = pictures.sheet(images, names, studio.described(wish, rows))
  link = pictures.download_link(png, f"pflow-seed{wish.seed}.png")
  hint = f'<p class="hint">{_hint(studio)}</p>'
  return [
    Shown(wish, grid, points, limit),
    link,
    hint,
    *(f'<p class="cost">{cost.replace("; ", "<br>", 1)}</p>' for cost in costs),
    *images,
  ]


def told(function: Callable) -> Callable:
  """Makes what a function of the page raises a message on the page, which otherwise stays as it is."""

  @functools.wraps(function)
  def wrapped(*args):
    try:
      return function(*args)
    except ValueError as error:
      gr.Warning(html.escape(str(error)))
      return gr.skip()
    except Exception as error:
      logger.exception("the page: %s", type(error).__name__)
      first = next(iter(str(error).splitlines()), "")
      message = html.escape(f"{type(error).__name__}: {first}"[:300])
      raise gr.Error(f"{message} (the terminal has more)", print_exception=False) from None

  return wrapped


def _what(studio: Studio) -> gr.components.Component:
  """The field for the prompt or the class."""
  if studio.has_prompts:
    return gr.Textbox(label="Prompt", placeholder="a red heart", scale=2, elem_id="what")
  names = studio.dataset.class_names or range(studio.dataset.num_classes)
  choices: list[Any] = [EACH, *((str(name), i) for i, name in enumerate(names))]
  return gr.Dropdown(choices, value=EACH, label="Class", visible=len(choices) > 1, min_width=150, elem_id="what")


def _rows(studio: Studio, colours: list[str]) -> tuple[list, list, list]:
  """The rows: fields of evaluations, costs and pictures. Points stand side by side, pictures one row below another."""
  nfe, costs, images = [], [], []

  def side(row, colour):
    with gr.Column(scale=0, min_width=200, elem_classes="side"):
      swatch = f'<span class="swatch" style="background:{colour}"></span>'
      gr.HTML(f'<div class="name">{swatch}{html.escape(row.name)}</div>')
      with gr.Row():
        label = f"Evaluations of {row.name}"
        options: dict[str, Any] = dict(show_label=False, container=False, precision=0, min_width=60)
        nfe.append(gr.Number(row.nfe, label=label, elem_classes="nfe", **options))
        gr.HTML(f'<span class="unit">{"steps" if row.is_teacher else "evaluations"}</span>')
      costs.append(gr.HTML())

  def image(row):
    options: dict[str, Any] = dict(show_label=False, container=False, interactive=False, buttons=[], format="png")
    alt = f"Samples of {row.name}"
    classes = ["samples", "panel"] if studio.has_points else ["samples"]
    images.append(gr.Image(type="pil", image_mode="RGBA", elem_classes=classes, alt_text=alt, **options))

  if studio.has_points:
    with gr.Row():
      for row, colour in zip(studio.rows, colours, strict=True):
        with gr.Column(min_width=220):
          side(row, colour)
          image(row)
  else:
    for row, colour in zip(studio.rows, colours, strict=True):
      with gr.Row(equal_height=True, elem_classes="model"):
        side(row, colour)
        with gr.Column(min_width=300):
          image(row)
  return nfe, costs, images


def _clicked(studio: Studio, colours: list[str], index: int) -> Callable:
  names = [row.name for row in studio.rows]

  def clicked(shown: Shown | None, event: gr.SelectData):
    if shown is None:
      raise ValueError("Draw first: what was drawn here is no longer kept")
    x, y = event.index
    if studio.has_points:
      chosen = pictures.nearest_point(shown.points[index], shown.limit, x, y)
      drawing = pictures.way_panels(studio.ways(shown.wish, chosen), names, colours)
      return _figure("The way of the nearest point, and of others, from noise (ring) to data (dot)", drawing)
    assert shown.grid is not None
    found = shown.grid.at(x, y)
    if found is None:
      return gr.skip()
    column, pixel = found
    ways, seed = studio.ways(shown.wish, column), shown.wish.seed + column
    told = f"Seed {seed}: the pixel in row {pixel[0] + 1}, column {pixel[1] + 1}; a dot is an evaluation of the network"
    return _figure(told, pictures.value_chart(ways, pixel, shown.grid.shape, names, colours))

  return clicked


def _figure(told: str, drawing: str) -> str:
  return f'<p class="hint">{told}</p><div class="figure">{drawing}</div>'


def _lead(studio: Studio) -> str:
  same = "All models start" if studio.has_points else "Column by column, all models start"
  return f"{same} from the same noise. A teacher evaluates its network at every step; a student goes far on one."


def _hint(studio: Studio) -> str:
  if studio.has_points:
    return "Click a point to see its way from noise."
  return "Click a pixel to see its value from noise to data."
