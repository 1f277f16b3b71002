"""FGVC-Aircraft's images without the banner that names the photographer."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from util.data.sources import BadImage, FileSource

BANNER = 20  # rows of pixels at the bottom of each of FGVC-Aircraft's images; its authors ask to remove them


@dataclass
class BannerlessSource(FileSource):
    """Image files whose last `BANNER` rows are cut off."""

    def read(self, index: int) -> Image.Image:
        """Return the image without its banner; BadImage if it has no more rows than that."""
        image = Image.open(io.BytesIO(super().read(index)))
        if image.height <= BANNER:
            raise BadImage(f"has {image.height} rows of pixels, its banner alone has {BANNER}")
        return image.crop((0, 0, image.width, image.height - BANNER))
