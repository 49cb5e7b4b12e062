"""Draws the pictures of these pages: `python data_samples/pages/draw.py`. Pages and pictures are CC0 1.0."""
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent / "pictures"
SIZE = (240, 180)


def sheet(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, colour)
    return image, ImageDraw.Draw(image)


def tides() -> Image.Image:
    image, pen = sheet("#0b1d3a")
    pen.ellipse((60, 60, 140, 120), fill="#56B4E9")           # the water, drawn out towards the moon
    pen.ellipse((75, 65, 125, 115), fill="#2e7d32")
    pen.ellipse((195, 78, 219, 102), fill="#dddddd")
    pen.line((145, 90, 188, 90), fill="#F0E442", width=2)
    return image


def volcano() -> Image.Image:
    image, pen = sheet("#cfe8f7")
    pen.polygon([(20, 170), (105, 50), (135, 50), (220, 170)], fill="#6b4f3f")
    pen.polygon([(112, 50), (128, 50), (124, 170), (116, 170)], fill="#D55E00")
    pen.ellipse((80, 150, 160, 178), fill="#D55E00")
    for x, y, r in ((120, 34, 14), (140, 22, 16), (105, 20, 12)):
        pen.ellipse((x - r, y - r, x + r, y + r), fill="#888888")
    return image


def leaf() -> Image.Image:
    image, pen = sheet("#ffffff")
    pen.ellipse((70, 40, 190, 120), fill="#009E73")
    pen.line((60, 140, 185, 62), fill="#005c3f", width=3)
    pen.ellipse((8, 8, 48, 48), fill="#F0E442")
    for y in (40, 60, 80):
        pen.line((45, y - 5, 85, y + 12), fill="#E69F00", width=2)
    return image


def lens() -> Image.Image:
    image, pen = sheet("#ffffff")
    pen.ellipse((105, 30, 135, 150), outline="#0072B2", width=3)
    for y in (60, 90, 120):
        pen.line((10, y, 120, y), fill="#D55E00", width=2)
        pen.line((120, y, 200, 90), fill="#D55E00", width=2)
    pen.ellipse((196, 86, 204, 94), fill="#000000")
    return image


def circuit(closed: bool) -> Image.Image:
    image, pen = sheet("#ffffff")
    pen.rectangle((40, 40, 200, 140), outline="#000000", width=3)
    pen.rectangle((30, 75, 52, 105), fill="#ffffff")
    pen.line((30, 82, 52, 82), fill="#000000", width=3)        # the battery
    pen.line((36, 96, 46, 96), fill="#000000", width=6)
    pen.ellipse((184, 72, 216, 104), fill="#F0E442" if closed else "#ffffff", outline="#000000", width=3)
    if not closed:
        pen.rectangle((100, 34, 140, 46), fill="#ffffff")
        pen.line((100, 40, 136, 20), fill="#000000", width=3)
    return image


def pendulum() -> Image.Image:
    image, pen = sheet("#f7f3e8")
    pen.line((60, 15, 180, 15), fill="#444444", width=5)
    for x, colour in ((60, "#bbbbbb"), (120, "#bbbbbb"), (175, "#0072B2")):
        bottom = 150 if x == 120 else 135
        pen.line((120, 15, x, bottom), fill=colour, width=2)
        pen.ellipse((x - 12, bottom - 12, x + 12, bottom + 12), fill=colour)
    return image


def moon() -> Image.Image:
    image, pen = sheet("#000000")
    for i, shift in enumerate((44, 22, 0, -22, -44)):
        x = 24 + 48 * i
        pen.ellipse((x - 18, 72, x + 18, 108), fill="#dddddd")
        if shift:
            pen.ellipse((x - 18 + shift, 72, x + 18 + shift, 108), fill="#000000")
    return image


def main() -> None:
    HERE.mkdir(exist_ok=True)
    pictures = {"tides": tides(), "volcano": volcano(), "leaf": leaf(), "lens": lens(), "open": circuit(False),
                "closed": circuit(True), "pendulum": pendulum(), "moon": moon()}
    for name, image in pictures.items():
        image.quantize(32).save(HERE / f"{name}.png", optimize=True)
    whole = (HERE / "leaf.png").read_bytes()
    (HERE / "torn.png").write_bytes(whole[:len(whole) // 2])   # half a file, as a broken download leaves it


if __name__ == "__main__":
    main()
