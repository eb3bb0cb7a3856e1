"""Draw a contact sheet of an emoji model: one picture per prompt, each with its prompt below it.

python tools/contact_sheet.py src/triptych/embedded/emoji-64 docs/contact-sheet.png
python tools/contact_sheet.py src/triptych/embedded/emoji-64 docs/held-out.png --held-out
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from emoji_data import HELD_OUT
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    *("grinning face", "crying face", "angry face", "face with sunglasses", "red heart", "ghost", "robot", "alien"),
    *("dog face", "cat face", "fox", "panda", "pig face", "frog", "unicorn", "penguin"),
    *("owl", "fish", "octopus", "butterfly", "honeybee", "snail", "turtle", "whale"),
    *("sunflower", "rose", "tree", "cactus", "mushroom", "apple", "banana", "strawberry"),
    *("watermelon", "carrot", "pizza", "hamburger", "doughnut", "birthday cake", "ice cream", "coffee"),
    *("house", "castle", "volcano", "rainbow", "sun", "crescent moon", "snowman", "fire"),
    *("car", "bus", "bicycle", "rocket", "airplane", "sailboat", "tractor", "helicopter"),
    *("guitar", "balloon", "soccer ball", "umbrella", "light bulb", "key", "t-shirt", "trophy"),
)
"""Names the model was trained with."""

COLUMNS, CELL, CAPTION, BATCH = 8, 128, 22, 16


def draw(model: Path, prompts: list[str], seed: int) -> list[Image.Image]:
    """Draw every prompt with the same seed and the model's own settings."""
    pipeline = Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = json.loads((model / "triptych.json").read_text(encoding="utf-8"))["defaults"]
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed) for _ in batch]
        images += pipeline(prompt=batch, generator=generators, **settings).images
    return images


def arrange(images: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Put the pictures in a grid, enlarged, with their prompts."""
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = index % columns * CELL, index // columns * (CELL + CAPTION)
        sheet.paste(image.resize((CELL - 8, CELL - 8), Image.Resampling.LANCZOS), (x + 4, y + 4))
        pen.text((x + CELL / 2, y + CELL + 4), prompt, fill="black", font=font, anchor="mm")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model repository")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--held-out", action="store_true", help="draw the combinations kept out of training")
    parser.add_argument("--prompts", help="draw these prompts instead, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = [" ".join(pair) for pair in HELD_OUT] if options.held_out else list(PROMPTS)
    if options.prompts:
        prompts = [prompt.strip() for prompt in options.prompts.split(",")]
    sheet = arrange(draw(options.model, prompts, options.seed), prompts)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
