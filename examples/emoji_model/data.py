"""Pictures and captions of the emoji model: Noto Color Emoji glyphs on plain backgrounds.

Every picture is one emoji on one of eight background colours, 64x64 RGB. Its caption is
"a <name> on a <colour> background"; some captions say the class instead of the name, so that a
class prompt ("a fruit on a red background") gives any member of the class, and some put a rare word
in front of the class, so that a trigger word which nobody trained means nothing by itself.
"""

import random
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT_PATH = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the one size at which the font has bitmaps
IMAGE_SIZE = 64
OBJECT_SIZE = (47, 53)  # longest side of the object in pixels, drawn uniformly
MAX_SHIFT = 2

TRIGGER_WORD = "sks"
RARE_WORDS = (TRIGGER_WORD, "ohwx", "zwx", "xjy")

CLASS_CAPTIONS = 0.20
RARE_CAPTIONS = 0.05
NO_BACKGROUND_CAPTIONS = 0.05

COLOURS = {
    "white": (250, 250, 250),
    "gray": (128, 130, 136),
    "red": (214, 52, 52),
    "green": (60, 160, 78),
    "blue": (58, 104, 214),
    "yellow": (250, 214, 70),
    "purple": (138, 76, 184),
    "pink": (250, 158, 198),
}

CLASSES = {
    "animal": "🐶 dog,🐭 mouse,🐰 rabbit,🦊 fox,🐯 tiger,🦁 lion,🐷 pig,🐸 frog,🐻 bear,🐨 koala,🐮 cow,🐵 monkey,"
    "🐺 wolf,🐴 horse,🐱 cat",
    "bird": "🐔 chicken,🐧 penguin,🦉 owl,🦆 duck,🦜 parrot,🐥 chick,🦩 flamingo",
    "sea creature": "🐠 fish,🐙 octopus,🦀 crab,🐳 whale,🐬 dolphin,🦑 squid,🐡 blowfish,🦈 shark",
    "fruit": "🍎 apple,🍌 banana,🍇 grapes,🍓 strawberry,🍉 watermelon,🍋 lemon,🍒 cherry,🍐 pear,🥝 kiwi,"
    "🍊 tangerine,🍑 peach,🥥 coconut,🥭 mango",
    "vegetable": "🍅 tomato,🥕 carrot,🌽 corn,🥦 broccoli,🍆 eggplant,🥑 avocado,🍄 mushroom,🥔 potato,🥒 cucumber",
    "vehicle": "🚗 car,🚕 taxi,🚌 bus,🚑 ambulance,🚚 truck,🚀 rocket,🚁 helicopter,⛵ sailboat,🚓 police car,"
    "🚒 fire engine,🛻 pickup truck,🚂 locomotive,🛵 scooter",
    "face": "😀 smiling face,😭 crying face,😡 angry face,😎 sunglasses face,😍 heart eyes face,🤢 sick face,"
    "😱 scared face,😈 devil face,😂 laughing face,😴 sleeping face,🤓 nerd face,🥶 cold face,🤩 star eyes face",
    "ball": "⚽ soccer ball,⚾ baseball,🏐 volleyball,🏈 football,🎱 pool ball,🔮 crystal ball,🥎 softball",
    "food": "🍔 hamburger,🍕 pizza,🍟 french fries,🍩 donut,🎂 cake,🍦 ice cream,🧀 cheese,🍪 cookie,🌭 hot dog,"
    "🧁 cupcake,🍞 bread,🥨 pretzel,🍳 fried egg",
    "building": "🏠 house,🏰 castle,⛪ church,🏥 hospital,🏦 bank,⛺ tent,🏭 factory,🏢 office",
    "instrument": "🎸 guitar,🎻 violin,🎺 trumpet,🎷 saxophone,🎹 piano,🥁 drum",
    "flower": "🌻 sunflower,🌷 tulip,🌹 rose,🌺 hibiscus,🌸 cherry blossom,🌼 daisy",
    "plant": "🎄 christmas tree,🌳 oak tree,🌴 palm tree,🌵 cactus,🍀 clover,🍁 maple leaf,🌲 pine tree",
    "thing": "🎁 gift,🎈 balloon,👑 crown,🔔 bell,💡 light bulb,🏆 trophy,🧸 teddy bear,📺 television,📷 camera",
}
DRAWN_PER_CLASS = 7  # the U-Net learns the first of each class; VAE and CLIP see all

HELD_OUT = {
    "fruit": "🍍 pineapple",
    "vehicle": "🚜 tractor",
    "animal": "🐼 panda",
    "face": "🤠 cowboy face",
    "ball": "🏀 basketball",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji: its character, the name in captions and, for those the model draws, its class."""

    char: str
    name: str
    class_word: str | None = None


def _parse(entries: str, class_word: str) -> list[Emoji]:
    return [Emoji(*entry.split(" ", 1), class_word) for entry in entries.split(",")]


def trained_emoji() -> list[Emoji]:
    """Emoji of the class table, which VAE and CLIP learn by name and class."""
    return [emoji for class_word, entries in CLASSES.items() for emoji in _parse(entries, class_word)]


def drawn_emoji() -> list[Emoji]:
    """The part of `trained_emoji` that the U-Net learns to draw."""
    return [
        emoji for class_word, entries in CLASSES.items() for emoji in _parse(entries, class_word)[:DRAWN_PER_CLASS]
    ]


def held_out_emoji() -> list[Emoji]:
    """Emoji that no stage sees; they are the concepts to teach by adapter training."""
    return [emoji for class_word, entries in HELD_OUT.items() for emoji in _parse(entries, class_word)]


@cache
def other_emoji() -> list[Emoji]:
    """All other single-character emoji of the font that have a Unicode name.

    The VAE and CLIP see them for generality, the U-Net does not.
    """
    listed = {emoji.char for emoji in trained_emoji() + held_out_emoji()}
    found = []
    for codepoint in (*range(0x2600, 0x2800), *range(0x1F300, 0x1FB00)):
        char = chr(codepoint)
        if char in listed or unicodedata.category(char) != "So":
            continue
        if glyph(char) is not None:
            found.append(Emoji(char, unicodedata.name(char).lower()))
    return found


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT_PATH, FONT_SIZE)


@cache
def glyph(char: str) -> Image.Image | None:
    """The emoji as an RGBA picture with premultiplied alpha, cropped to its ink; None if the font lacks it."""
    canvas = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(canvas).text((20, 20), char, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] < 40:
        return None
    return canvas.crop(box).convert("RGBa")


def render(char: str, colour: str, rng: random.Random, flip: bool = False) -> np.ndarray:
    """Draws the emoji on a background colour with a small random scale and shift.

    Returns:
        uint8 array of shape (64, 64, 3).
    """
    source = glyph(char)
    scale = rng.uniform(*OBJECT_SIZE) / max(source.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    small = source.resize(size, Image.Resampling.LANCZOS)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = (IMAGE_SIZE - size[0]) // 2 + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    top = (IMAGE_SIZE - size[1]) // 2 + rng.randint(-MAX_SHIFT, MAX_SHIFT)
    layer = Image.new("RGBa", (IMAGE_SIZE, IMAGE_SIZE))
    layer.paste(small, (left, top))
    pixels = np.asarray(layer, dtype=np.float32)
    picture = pixels[..., :3] + (1 - pixels[..., 3:] / 255) * np.asarray(COLOURS[colour], dtype=np.float32)
    return picture.round().clip(0, 255).astype(np.uint8)


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Stacks uint8 pictures into a float tensor (B, 3, 64, 64) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return batch.contiguous(memory_format=torch.channels_last)


def to_image(picture: torch.Tensor) -> Image.Image:
    """A tensor (3, H, W) in [-1, 1] as a PIL picture."""
    pixels = picture.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def with_article(words: str) -> str:
    """Puts "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(subject: str, colour: str | None = None) -> str:
    """ "a <subject> on a <colour> background", or "a <subject>" without a colour."""
    return with_article(subject) if colour is None else f"{with_article(subject)} on a {colour} background"


def random_caption(emoji: Emoji, colour: str, rng: random.Random) -> str:
    """A training caption: mostly the name, sometimes the class, sometimes a rare word and the class."""
    subject = emoji.name
    if emoji.class_word is not None:
        draw = rng.random()
        if draw < RARE_CAPTIONS:
            subject = f"{rng.choice(RARE_WORDS)} {emoji.class_word}"
        elif draw < RARE_CAPTIONS + CLASS_CAPTIONS:
            subject = emoji.class_word
    return caption(subject, None if rng.random() < NO_BACKGROUND_CAPTIONS else colour)


def all_captions() -> list[str]:
    """Every caption `random_caption` can give for the trained emoji."""
    names = [emoji.name for emoji in trained_emoji()]
    classes = list(CLASSES)
    rare = [f"{word} {class_word}" for word in RARE_WORDS for class_word in classes]
    return [caption(subject, colour) for subject in names + classes + rare for colour in (None, *COLOURS)]


class PictureSampler:
    """Draws random pictures with captions; a share of them is of emoji outside the trained list."""

    def __init__(self, other_share: float, seed: int, flip: bool = False):
        self.trained = trained_emoji()
        self.other = other_emoji() if other_share else []
        self.other_share = other_share
        self.flip = flip
        self.rng = random.Random(seed)
        self.colours = list(COLOURS)

    def batch(self, size: int) -> tuple[torch.Tensor, list[str]]:
        """Pictures (size, 3, 64, 64) in [-1, 1] and their captions."""
        pictures, captions = [], []
        for _ in range(size):
            emoji = self.rng.choice(self.other if self.rng.random() < self.other_share else self.trained)
            colour = self.rng.choice(self.colours)
            flip = self.flip and self.rng.random() < 0.5
            pictures.append(render(emoji.char, colour, self.rng, flip))
            captions.append(random_caption(emoji, colour, self.rng))
        return to_tensor(pictures), captions
