"""A small picture of each notebook, for README: one of its outputs.

    python studies/thumbnails.py

writes `figures/thumbnails/01.png`, ….
"""

import base64
import io

import nbformat
from PIL import Image

from masktune_utils.settings import REPOSITORY

SHOWN = {"02": 1, "04": 1, "06": 3, "07": 1}  # number of the picture, if not the first
SIZE = 160  # pixels


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    """All of a notebook's outputs."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in {"image/png", "image/jpeg"} & data.keys():
                found.append(Image.open(io.BytesIO(base64.b64decode(data[kind]))))
    return found


def main() -> None:
    folder = REPOSITORY / "figures" / "thumbnails"
    folder.mkdir(exist_ok=True)
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        number = path.name[:2]
        picture = pictures(nbformat.read(path, as_version=4))[SHOWN.get(number, 0)]
        picture = picture.convert("RGB")
        picture.thumbnail((SIZE, SIZE))
        square = Image.new("RGB", (SIZE, picture.height), "white")
        square.paste(picture)
        square.quantize(64).save(folder / f"{number}.png", optimize=True)


if __name__ == "__main__":
    main()
