"""Draw the method's overview, docs/overview.svg and docs/overview.png: python docs/draw_overview.py

The photo lies in scikit-learn. It is by vultilion, https://www.flickr.com/photos/vultilion/6056698931, under
CC BY 2.0, https://creativecommons.org/licenses/by/2.0: whoever shows the drawing keeps the credit in it.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import adjust_hue

DOCS = Path(__file__).resolve().parent.parent / "docs"
PHOTO_CREDIT = "Photo: vultilion, Flickr (via scikit-learn), CC BY 2.0, cropped and edited"

# One unit is one pixel of a README 900 pixels wide; the PNG has two pixels a unit, for sharp screens.
WIDTH, HEIGHT = 900, 470
UNITS_PER_INCH, PIXELS_PER_UNIT = 100, 2

INK, FAINT = "#22303c", "#66757f"
STUDENT, STUDENT_FILL = "#2563ab", "#dce9f8"
CONTEXT, CONTEXT_FILL = "#1f8a70", "#d5eee6"
DECODER, DECODER_FILL = "#7a4fa3", "#ebe2f4"
LOSS, LOSS_FILL = "#c8443a", "#fbe3df"
MASK_TOKEN = "#c3c9ce"

VIEW = 84  # side of a view
GRID = 8  # patches a side: 64, of which 16 stay visible
ROW_STUDENT, ROW_HEADS, ROW_CONTEXT = 102, 236, 368  # centres
# Centres of what stands one above the other.
X_IMAGE, X_VIEW, X_PATCHES, X_ENCODER, X_TOKENS = 67, 194, 304, 421, 500
X_DECODER_TOKENS, X_DECODER, X_PIXELS, X_LOSS = 563, 634, 741, 849
X_MEAN, X_PROJECTOR, X_PREDICTOR, X_OUTPUT = 550, 622, 706, 773


class Canvas:
    """Shapes on a page whose y axis points down; `x, y` is always a centre."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / UNITS_PER_INCH, HEIGHT / UNITS_PER_INCH), facecolor="white")
        self.ax: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), autoscale_on=False)
        self.ax.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 12, colour: str = INK, **style) -> None:
        style = {"ha": "center", "va": "center", "linespacing": 1.25} | style
        self.ax.text(x, y, text, fontsize=size * 72 / UNITS_PER_INCH, color=colour, zorder=5, **style)

    def box(self, x: float, y: float, width: float, height: float, edge: str, fill: str, **style) -> None:
        corner = (x - width / 2, y - height / 2)
        style = {"linewidth": 1.2, "zorder": 3} | style
        style |= {"boxstyle": "round,pad=0,rounding_size=7", "edgecolor": edge, "facecolor": fill}
        self.ax.add_patch(FancyBboxPatch(corner, width, height, **style))

    def picture(self, x: float, y: float, width: float, height: float, picture: Image.Image) -> None:
        picture = picture.resize((width * PIXELS_PER_UNIT, height * PIXELS_PER_UNIT), Image.LANCZOS)
        extent = (x - width / 2, x + width / 2, y + height / 2, y - height / 2)
        self.ax.imshow(np.asarray(picture), extent=extent, aspect="auto", interpolation="none", zorder=3)

    def arrow(self, *points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
        """Draw straight pieces through the points, with a head at the last."""
        style = {"color": colour, "linewidth": 1.3, "zorder": 2}
        style["linestyle"] = (0, (4, 2.5)) if dashed else "-"
        xs, ys = zip(*points[:-1], strict=True)
        self.ax.plot(xs, ys, solid_joinstyle="round", **style)
        style |= {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
        self.ax.add_patch(FancyArrowPatch(points[-2], points[-1], **style))

    def circle(self, x: float, y: float, label: str, edge: str, fill: str) -> None:
        self.ax.add_patch(Circle((x, y), 15, edgecolor=edge, facecolor=fill, linewidth=1.2, zorder=3))
        self.text(x, y, label, 14)

    def tokens(self, x: float, y: float, colours: list[list[str]]) -> None:
        """Draw columns of little squares, the tokens."""
        side, pitch = 7.5, 10.5
        for column, colours_of_column in enumerate(colours):
            for row, colour in enumerate(colours_of_column):
                left = x + (column - len(colours) / 2) * pitch + (pitch - side) / 2
                top = y + (row - len(colours_of_column) / 2) * pitch + (pitch - side) / 2
                square = Rectangle((left, top), side, side, facecolor=colour, edgecolor="none", zorder=3)
                self.ax.add_patch(square)


def make_views() -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return the image, view u and view v, as the augmentation would make them."""
    image = Image.fromarray(load_sample_image("flower.jpg")).crop((55, 0, 585, 427))
    side = image.height
    view_u = image.crop((0, 0, side, side))
    view_v = ImageOps.mirror(image.crop((image.width - side, 0, image.width, side)))
    view_v = ImageEnhance.Brightness(view_v).enhance(1.35)
    view_v = adjust_hue(view_v, -0.1).filter(ImageFilter.GaussianBlur(3))
    return image, view_u, view_v


def cut(picture: Image.Image, blank: np.ndarray, blank_colour: str = "white") -> Image.Image:
    """Cut a square picture into patches with gaps between; `blank` [GRID, GRID] patches become one colour."""
    patch = 34
    pixels = np.array(picture.resize((GRID * patch, GRID * patch), Image.LANCZOS))
    colour = np.array(Image.new("RGB", (1, 1), blank_colour))[0, 0]
    pixels[np.kron(blank, np.ones((patch, patch), dtype=bool))] = colour
    inside = np.arange(GRID * patch) % patch
    gap = (inside < 2) | (inside >= patch - 2)
    pixels[gap] = 255
    pixels[:, gap] = 255
    return Image.fromarray(pixels)


def draw_views(canvas: Canvas, image: Image.Image, view_u: Image.Image, view_v: Image.Image) -> None:
    """Draw the left part: the image and its two views."""
    image_width = round(VIEW * image.width / image.height)
    canvas.picture(X_IMAGE, ROW_HEADS, image_width, VIEW, image)
    canvas.text(X_IMAGE, ROW_HEADS + VIEW / 2 + 12, "image")
    for row, towards, view in ((ROW_STUDENT, -1, view_u), (ROW_CONTEXT, 1, view_v)):
        start = (X_IMAGE, ROW_HEADS + towards * (VIEW / 2 + (22 if towards > 0 else 4)))
        canvas.arrow(start, (X_IMAGE, row), (X_VIEW - VIEW / 2 - 4, row))
        canvas.picture(X_VIEW, row, VIEW, VIEW, view)
        canvas.arrow((X_VIEW + VIEW / 2 + 3, row), (X_PATCHES - VIEW / 2 - 3, row))
    canvas.text(X_VIEW, ROW_STUDENT - VIEW / 2 - 12, "view $u$", 13)
    canvas.text(X_VIEW, ROW_STUDENT + VIEW / 2 + 19, "simple\nresized crop", 11, FAINT)
    canvas.text(X_VIEW, ROW_CONTEXT - VIEW / 2 - 12, "view $v$", 13)
    below = "another crop, colour jitter,\nthen grey, solarised or blurred"
    canvas.text(X_VIEW - 40, ROW_CONTEXT + VIEW / 2 + 19, below, 11, FAINT)


def draw_reconstruction(canvas: Canvas, view_u: Image.Image, hidden: np.ndarray) -> None:
    """Draw the top row: what a masked autoencoder does."""
    y = ROW_STUDENT
    canvas.picture(X_PATCHES, y, VIEW, VIEW, cut(view_u, hidden, "#dfe3e6"))
    canvas.text(X_PATCHES, y + VIEW / 2 + 12, "75 % hidden", 11, FAINT)
    canvas.arrow((X_PATCHES + VIEW / 2 + 3, y), (X_ENCODER - 49, y))
    canvas.box(X_ENCODER, y, 94, 72, STUDENT, STUDENT_FILL)
    canvas.text(X_ENCODER, y - 11, "student\nencoder", 13, STUDENT, weight="bold")
    canvas.text(X_ENCODER, y + 21, "visible only", 11, FAINT)
    canvas.arrow((X_ENCODER + 49, y), (X_TOKENS - 9, y))
    canvas.tokens(X_TOKENS, y, [[STUDENT] * 4])
    canvas.arrow((X_TOKENS + 9, y), (X_DECODER_TOKENS - 14, y))
    columns = [[MASK_TOKEN] * 8, [MASK_TOKEN] * 8]
    for column, row in ((0, 1), (1, 3), (0, 4), (1, 6)):
        columns[column][row] = STUDENT
    canvas.tokens(X_DECODER_TOKENS, y, columns)
    canvas.text(X_DECODER_TOKENS, y + VIEW / 2 + 12, "+ mask tokens", 11, FAINT)
    canvas.arrow((X_DECODER_TOKENS + 13, y), (X_DECODER - 38, y))
    canvas.box(X_DECODER, y, 72, 48, DECODER, DECODER_FILL)
    canvas.text(X_DECODER, y, "decoder", 13, DECODER, weight="bold")
    canvas.arrow((X_DECODER + 38, y), (X_PIXELS - VIEW / 2 - 3, y))
    prediction = view_u.filter(ImageFilter.GaussianBlur(9))
    canvas.picture(X_PIXELS, y, VIEW, VIEW, cut(prediction, ~hidden))
    canvas.text(X_PIXELS, y + VIEW / 2 + 12, "pixels of hidden patches", 11, FAINT)
    canvas.arrow((X_PIXELS + VIEW / 2 + 3, y), (X_LOSS - 37, y))
    # The target passes above everything.
    top = 22
    canvas.arrow((X_VIEW + 30, y - VIEW / 2 - 4), (X_VIEW + 30, top), (X_LOSS, top), (X_LOSS, y - 20))
    canvas.text((X_ENCODER + X_PIXELS) / 2, top, "true pixels", 11, FAINT, backgroundcolor="white")


def draw_heads(canvas: Canvas) -> None:
    """Draw the middle row: the visible tokens' way to û."""
    y = ROW_HEADS
    canvas.arrow((X_TOKENS, ROW_STUDENT + 24), (X_TOKENS, y), (X_MEAN - 24, y))
    canvas.box(X_MEAN, y, 44, 32, STUDENT, "white")
    canvas.text(X_MEAN, y, "mean", 12)
    canvas.arrow((X_MEAN + 24, y), (X_PROJECTOR - 35, y))
    canvas.box(X_PROJECTOR, y, 66, 40, STUDENT, STUDENT_FILL)
    canvas.text(X_PROJECTOR, y, "projector", 12, STUDENT)
    canvas.arrow((X_PROJECTOR + 35, y), (X_PREDICTOR - 34, y))
    canvas.box(X_PREDICTOR, y, 64, 40, STUDENT, STUDENT_FILL)
    canvas.text(X_PREDICTOR, y, "predictor", 12, STUDENT)
    canvas.arrow((X_PREDICTOR + 34, y), (X_OUTPUT - 18, y))
    canvas.circle(X_OUTPUT, y, r"$\hat{u}$", STUDENT, "white")


def draw_context(canvas: Canvas, view_v: Image.Image) -> None:
    """Draw the bottom row, which no gradient reaches, and the momentum updates into it."""
    y = ROW_CONTEXT
    left, right, top, bottom = X_PATCHES - 54, X_OUTPUT + 22, y - 58, y + 76
    panel = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    canvas.box(*panel, "none", "#f1f8f6", zorder=0)
    canvas.text(right - 10, bottom - 13, "no gradient", 12, CONTEXT, ha="right", style="italic")
    canvas.picture(X_PATCHES, y, VIEW, VIEW, cut(view_v, np.zeros((GRID, GRID), dtype=bool)))
    canvas.text(X_PATCHES, y + VIEW / 2 + 12, "nothing hidden", 11, FAINT)
    canvas.arrow((X_PATCHES + VIEW / 2 + 3, y), (X_ENCODER - 49, y))
    canvas.box(X_ENCODER, y, 94, 72, CONTEXT, CONTEXT_FILL)
    canvas.text(X_ENCODER, y - 11, "context\nencoder", 13, CONTEXT, weight="bold")
    canvas.text(X_ENCODER, y + 21, "all patches", 11, FAINT)
    canvas.arrow((X_ENCODER + 49, y), (X_TOKENS - 13, y))
    canvas.tokens(X_TOKENS, y, [[CONTEXT] * 8, [CONTEXT] * 8])
    canvas.arrow((X_TOKENS + 13, y), (X_MEAN - 24, y))
    canvas.box(X_MEAN, y, 44, 32, CONTEXT, "white")
    canvas.text(X_MEAN, y, "mean", 12)
    canvas.arrow((X_MEAN + 24, y), (X_PROJECTOR - 35, y))
    canvas.box(X_PROJECTOR, y, 66, 40, CONTEXT, CONTEXT_FILL)
    canvas.text(X_PROJECTOR, y, "projector", 12, CONTEXT)
    canvas.arrow((X_PROJECTOR + 35, y), (X_OUTPUT - 18, y))
    canvas.circle(X_OUTPUT, y, r"$\hat{v}$", CONTEXT, "white")
    canvas.arrow((X_ENCODER, ROW_STUDENT + 39), (X_ENCODER, y - 39), colour=CONTEXT, dashed=True)
    canvas.text(X_ENCODER - 8, ROW_HEADS, "momentum\n(EMA)", 12, CONTEXT, ha="right")
    canvas.arrow((X_PROJECTOR, ROW_HEADS + 23), (X_PROJECTOR, y - 23), colour=CONTEXT, dashed=True)
    canvas.text(X_PROJECTOR - 8, (ROW_HEADS + y) / 2 - 9, "EMA", 12, CONTEXT, ha="right")


def draw_losses(canvas: Canvas) -> None:
    """Draw the right part: both losses, their sum, and the formula."""
    between = (ROW_HEADS + ROW_CONTEXT) / 2
    total = (ROW_STUDENT + between) / 2
    canvas.box(X_LOSS, ROW_STUDENT, 68, 34, LOSS, LOSS_FILL)
    canvas.text(X_LOSS, ROW_STUDENT, r"$\mathcal{L}_\mathrm{MIM}$", 15, LOSS)
    canvas.box(X_LOSS, between, 68, 34, LOSS, LOSS_FILL)
    canvas.text(X_LOSS, between, r"$\mathcal{L}_\mathrm{BC}$", 15, LOSS)
    turn = X_OUTPUT + 28
    for row, towards in ((ROW_HEADS, -8), (ROW_CONTEXT, 8)):
        enters = between + towards
        canvas.arrow((X_OUTPUT + 16, row), (turn, row), (turn, enters), (X_LOSS - 37, enters))
    canvas.arrow((X_LOSS, ROW_STUDENT + 19), (X_LOSS, total - 23), colour=LOSS)
    canvas.arrow((X_LOSS, between - 19), (X_LOSS, total + 23), colour=LOSS)
    canvas.text(X_LOSS + 8, (total + between) / 2 + 2, r"$\times\,\alpha$", 13, LOSS, ha="left")
    canvas.box(X_LOSS, total, 68, 40, LOSS, LOSS)
    canvas.text(X_LOSS, total, "loss", 14, "white", weight="bold")


def draw_formula(canvas: Canvas) -> None:
    """Draw the bottom line."""
    y = HEIGHT - 14
    canvas.text(12, y, PHOTO_CREDIT, 8, FAINT, ha="left")
    formula = (
        r"$\mathrm{loss} = \mathcal{L}_\mathrm{MIM} + \alpha\,\mathcal{L}_\mathrm{BC}\,,\quad"
        r"\mathcal{L}_\mathrm{BC} = \left\|\,\hat{u}/\|\hat{u}\| - \hat{v}/\|\hat{v}\|\,\right\|^2$"
    )
    canvas.text(WIDTH - 14, y, formula, 14, ha="right")


def main() -> None:
    """Write both files."""
    # Text as outlines looks the same everywhere; the salt and no date keep the files the same.
    mpl.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "overview", "mathtext.fontset": "cm"})
    image, view_u, view_v = make_views()
    hidden = np.ones(GRID * GRID, dtype=bool)
    hidden[np.random.default_rng(13).permutation(GRID * GRID)[: GRID * GRID // 4]] = False
    canvas = Canvas()
    draw_views(canvas, image, view_u, view_v)
    draw_reconstruction(canvas, view_u, hidden.reshape(GRID, GRID))
    draw_heads(canvas)
    draw_context(canvas, view_v)
    draw_losses(canvas)
    draw_formula(canvas)
    DOCS.mkdir(exist_ok=True)
    dpi = UNITS_PER_INCH * PIXELS_PER_UNIT
    canvas.figure.savefig(DOCS / "overview.svg", dpi=dpi, metadata={"Date": None, "Creator": None})
    rendered = io.BytesIO()
    canvas.figure.savefig(rendered, format="png", dpi=dpi)
    # A palette cannot be told from the original here, and makes the file a quarter as large.
    palette = Image.open(rendered).convert("RGB").quantize(256)
    palette.save(DOCS / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
