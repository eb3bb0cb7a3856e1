"""The pictures and captions of the embedded emoji model.

Pictures are drawn from the Noto Color Emoji font; names and tags come from the ``emojibase-data`` package.
Nothing here downloads anything: both sources are named by the caller.
"""

import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

SIZE = 64
"""Edge of every picture, in pixels."""

SUBGROUPS = {
    *range(16),  # smileys, cat and monkey faces, hearts, emotions
    *range(16, 23),  # hands and parts of the body
    *range(34, 42),  # animals and plants
    *range(42, 49),  # food and drink
    *range(49, 60),  # places, transport, time, sky
    *range(60, 65),  # activities
    *range(65, 83),  # objects
    96,  # geometric shapes
}
"""Emojibase subgroups that are used whole, apart from ``SKIP``."""

EXTRA = {
    *("baby", "santa claus", "superhero", "mage", "fairy", "vampire", "mermaid", "genie", "zombie", "ninja"),
    *("astronaut", "princess", "police officer", "detective", "elf", "troll", "footprints", "woman dancing"),
    *("warning", "no entry", "prohibited", "radioactive", "biohazard", "yin yang", "peace symbol", "infinity"),
    *("recycling symbol", "check mark button", "check mark", "cross mark", "trident emblem", "play button"),
    *("star of david", "latin cross", "atom symbol"),
}
"""Names taken from the other subgroups (people, signs and symbols)."""

SKIP = re.compile(
    r"o’clock|-thirty|japan|medium square|medium-small|small square|large square|small (orange|blue) diamond"
    r"|radio button|square button|diamond with a dot|hand with index|pointing|wards .*hand|facing fist|mailbox"
    r"|shaking (horizontally|vertically)|dotted line|love hotel|tanabata|pine decoration|mahjong|flower playing"
    r"|bookmark|level slider|control knobs|(inbox|outbox) tray|incoming envelope|envelope with arrow|e-mail"
    r"|card index|spiral|page (facing|with)|linked paperclips|increasing with yen|(yen|euro|pound) banknote"
    r"|mobile phone with|camera with flash|speaker (low|medium)|gibbous|quarter moon$|waning|new moon$"
    r"|without snow|umbrella on ground|oncoming|suspension railway|cableway|tram|light rail|monorail"
    r"|mountain railway|minibus|pager|trackball|ledger|middle finger|placard|oden|fish cake|hearing aid|nest$"
    r"|suit$|tilted right|bikini|briefs|cigarette|right anger|left speech"
    # faces and hands that differ in little
    r"|grinning squinting|with sweat|kissing face with|squinting face|open hands|open eyes and|peeking"
    r"|expressionless|without mouth|in clouds|rolling eyes|lying face|exhaling|bags under|woozy|crossed-out"
    r"|diagonal|slightly frowning|hushed|anguished|persevering|confounded|downcast|frowning face with open"
    r"|disappointed|pensive|relieved|unamused|holding back|steam from|ogre|goblin|(weary|pouting|kissing) cat$"
    r"|wry smile|grinning cat with|heart (decoration|exclamation)|mending|revolving|growing heart|beating heart"
    r"|light blue heart|anger symbol|^dizzy|^hole|eye in|vulcan|raised back|splayed|palm (down|up)|palms up|pinch"
    r"|love-you|sign of the horns|(raised|oncoming) fist|heart hands|selfie|writing hand|mechanical|biting"
    # animals, plants and food that have a better known sibling
    r"|guide dog|service dog|^ewe|two-hump|water buffalo|^ox$|badger|beaver|^rat$|dodo|front-facing|black bird"
    r"|^wing$|boar$|bison|moose|donkey|cockroach|^cricket|mosquito|^fly$|^worm|microbe|^beetle|pig nose|leopard"
    r"|rosette|hyacinth|wilted|^lotus|sheaf|^herb|fluttering|leafless|white flower|ginger|pea pod|root vegetable"
    r"|brown mushroom|^beans|chestnut|flatbread|tamale|falafel|fondue|shallow pan|canned|poultry|cut of meat"
    r"|rice cracker|curry|roasted|dango|moon cake|custard|shaved ice|^sake|^mate|tumbler|pouring|beverage box"
    r"|amphora|teacup|clinking glasses"
    # places and things
    r"|^hut|derelict|classical|building construction|department|convenience|post office|hindu|synagogue|kaaba"
    r"|mosque|shinto|foggy|at dusk|bridge at|playground|motorway|bus stop|trolleybus|^metro|^station|railway"
    r"|high-speed|articulated|auto rickshaw|wheelchair|kick scooter|oil drum|passenger ship|^ferry$|motor boat"
    r"|departure|arrival|^seat|luggage|mantelpiece|stopwatch|not done|sun behind (small|large)|lightning and"
    r"|^fog$|wind face|cyclone|sparkler|firecracker|confetti|wind chime|moon viewing|red envelope|reminder"
    r"|admission|softball|rugby|field hockey|lacrosse|flag in hole|running shirt|^sled|curling|joystick|^joker"
    r"|nesting|^knot|^thread|sewing|lab coat|safety vest|goggles|^sari|kimono|swimsuit|woman’s clothes|clutch"
    r"|flat shoe|ballet|hair pick|prayer|man’s shoe|postal horn|bell with|studio|banjo|long drum|receiver|^fax"
    r"|low battery|computer disk|dvd|film |videocassette|diya|orange book|notebook|^label|nazar|hamsa"
    r"|identification|receipt|locked with|hammer and|^pick$|^clamp|broken chain|^link$|petri|alembic|x-ray"
    r"|lotion|mouse trap|safety pin|funeral|file |^bookmark|clipboard|round pushpin|triangular ruler|straight"
)
"""Names that are left out: look-alikes, writing, and pictures whose meaning a short prompt hardly tells."""

ALIASES = {
    "automobile": ("car",),
    "sport utility vehicle": ("suv",),
    "red apple": ("apple",),
    "red heart": ("heart", "love heart"),
    "deciduous tree": ("tree",),
    "hot beverage": ("coffee", "tea"),
    "beer mug": ("beer",),
    "doughnut": ("donut",),
    "hamburger": ("burger",),
    "french fries": ("fries",),
    "honeybee": ("bee",),
    "lady beetle": ("ladybug",),
    "wrapped gift": ("gift", "present"),
    "pile of poo": ("poop", "poo"),
    "airplane": ("plane",),
    "house": ("home",),
    "jack-o-lantern": ("pumpkin", "halloween pumpkin"),
    "light bulb": ("lamp", "bulb"),
    "t-rex": ("dinosaur",),
    "sauropod": ("dinosaur", "brontosaurus"),
    "blossom": ("flower", "yellow flower"),
    "crescent moon": ("moon",),
    "television": ("tv",),
    "mobile phone": ("phone", "smartphone"),
    "smiling face with sunglasses": ("cool face", "face with sunglasses"),
    "grinning face": ("happy face", "smiley"),
    "slightly smiling face": ("smile", "smiling face"),
    "crying face": ("sad face",),
    "headphone": ("headphones",),
    "ear of corn": ("corn",),
    "cheese wedge": ("cheese",),
    "wine glass": ("wine", "glass of wine"),
    "cooked rice": ("rice",),
    "bicycle": ("bike",),
    "motorcycle": ("motorbike",),
    "sailboat": ("boat",),
    "money bag": ("money",),
    "gem stone": ("diamond", "gem"),
    "closed book": ("book",),
    "soccer ball": ("ball", "football"),
    "flying saucer": ("ufo",),
    "wastebasket": ("trash can", "bin"),
    "laptop": ("computer",),
    "ringed planet": ("planet", "saturn"),
    "globe showing europe-africa": ("globe", "earth", "world"),
    "globe showing americas": ("globe", "earth", "world"),
    "high voltage": ("lightning", "lightning bolt"),
    "droplet": ("drop", "water drop"),
    "locomotive": ("steam train",),
    "cherries": ("cherry",),
    "grapes": ("grape",),
    "eyes": ("two eyes",),
    "hot pepper": ("chili", "chili pepper"),
    "four leaf clover": ("clover",),
    "high-heeled shoe": ("shoe", "high heel"),
    "running shoe": ("sneaker",),
    "police car light": ("siren",),
    "sun": ("sunshine",),
    "locked": ("lock", "padlock"),
    "magnifying glass tilted left": ("magnifying glass",),
    "teddy bear": ("teddy",),
    "christmas tree": ("xmas tree",),
    "spouting whale": ("blue whale",),
    "smiling face with horns": ("devil",),
    "smiling face with halo": ("angel face",),
    "unicorn": ("unicorn head",),
    "green salad": ("salad",),
    "steaming bowl": ("noodles", "soup"),
    "flexed biceps": ("muscle",),
}
"""Everyday words for pictures whose emoji name is not what people type."""

_FAMILIAR = """
grinning face, slightly smiling face, smiling face with heart-eyes, smiling face with sunglasses, crying face,
loudly crying face, angry face, thinking face, sleeping face, winking face, face with tears of joy, star-struck,
nerd face, smiling face with halo, smiling face with horns, skull, pile of poo, clown face, ghost, alien, robot,
alien monster, grinning cat, red heart, orange heart, yellow heart, green heart, blue heart, purple heart,
black heart, pink heart, broken heart, kiss mark, collision, speech balloon, waving hand, thumbs up, thumbs down,
clapping hands, victory hand, ok hand, flexed biceps, eyes, eye, nose, ear, brain, tooth, bone, foot, baby,
santa claus, mermaid, vampire, astronaut, ninja, princess, monkey face, monkey, gorilla, dog face, dog, poodle,
wolf, fox, raccoon, cat face, cat, black cat, lion, tiger face, tiger, horse face, horse, unicorn, zebra, deer,
cow face, cow, pig face, pig, goat, camel, giraffe, elephant, rhinoceros, mouse face, mouse, hamster,
rabbit face, rabbit, hedgehog, bat, bear, polar bear, koala, panda, sloth, kangaroo, paw prints, chicken, rooster,
baby chick, hatching chick, bird, penguin, eagle, duck, swan, owl, flamingo, peacock, parrot, frog, crocodile,
turtle, lizard, snake, dragon face, dragon, sauropod, t-rex, spouting whale, whale, dolphin, fish, tropical fish,
blowfish, shark, octopus, jellyfish, crab, lobster, shrimp, snail, butterfly, bug, ant, honeybee, lady beetle,
spider, spider web, scorpion, bouquet, cherry blossom, rose, hibiscus, sunflower, blossom, tulip, seedling,
potted plant, evergreen tree, deciduous tree, palm tree, cactus, four leaf clover, maple leaf, mushroom, grapes,
melon, watermelon, tangerine, lemon, lime, banana, pineapple, mango, red apple, green apple, pear, peach,
cherries, strawberry, blueberries, kiwi fruit, tomato, coconut, avocado, eggplant, potato, carrot, ear of corn,
hot pepper, bell pepper, cucumber, broccoli, onion, bread, croissant, pretzel, pancakes, cheese wedge, bacon,
hamburger, french fries, pizza, hot dog, sandwich, taco, egg, popcorn, sushi, ice cream, soft ice cream,
doughnut, cookie, birthday cake, shortcake, cupcake, pie, chocolate bar, candy, lollipop, honey pot,
glass of milk, hot beverage, wine glass, cocktail glass, beer mug, spoon, globe showing europe-africa, compass,
snow-capped mountain, volcano, desert island, house, houses, castle, church, hospital, tent, ferris wheel,
sunrise, cityscape, train, locomotive, bus, ambulance, fire engine, police car, taxi, automobile, pickup truck,
delivery truck, tractor, racing car, motorcycle, motor scooter, bicycle, wheel, stop sign, anchor, sailboat,
speedboat, ship, airplane, helicopter, rocket, flying saucer, satellite, hourglass done, watch, alarm clock,
crescent moon, full moon, sun, sun with face, ringed planet, star, cloud, cloud with rain, tornado, rainbow,
umbrella, high voltage, snowflake, snowman, comet, fire, droplet, water wave, jack-o-lantern, christmas tree,
fireworks, sparkles, balloon, party popper, ribbon, wrapped gift, ticket, trophy, sports medal, soccer ball,
baseball, basketball, volleyball, american football, tennis, bowling, boxing glove, bullseye, kite, pool 8 ball,
crystal ball, magic wand, video game, game die, puzzle piece, teddy bear, artist palette, yarn, glasses,
sunglasses, necktie, t-shirt, jeans, scarf, gloves, socks, dress, handbag, backpack, running shoe,
high-heeled shoe, crown, top hat, billed cap, lipstick, ring, gem stone, bell, musical note, microphone,
headphone, radio, saxophone, trumpet, guitar, violin, drum, mobile phone, telephone, battery, laptop,
television, camera, candle, light bulb, closed book, books, scroll, newspaper, money bag, coin, envelope,
package, pencil, pen, paintbrush, crayon, calendar, pushpin, paperclip, scissors, locked, key, hammer, axe,
dagger, bomb, bow and arrow, shield, wrench, screwdriver, gear, magnet, ladder, microscope, telescope, syringe,
pill, door, bed, chair, toilet, bathtub, broom, basket, bucket, soap, toothbrush, moai, warning, no entry,
radioactive, peace symbol, check mark button, cross mark, red circle, orange circle, yellow circle,
green circle, blue circle, purple circle, red square, yellow square, green square, blue square
"""

FAMILIAR = {" ".join(name.split()) for name in _FAMILIAR.split(",")}
"""What people ask for first. The second part of training shows these pictures more often than the others."""

FAMILIAR_WEIGHT = 5.0

HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 115, "blue": 212, "purple": 275, "pink": 328}
"""The hue in degrees that each colour word of the recoloured pictures stands for."""

RECOLOURED = {12, *range(34, 44), 46, 51, *range(53, 57), 60, 62, 64, 65, *range(67, 71), 72, 75, 78, 81}
"""Emojibase subgroups whose pictures are also shown to the model in other colours."""

RECOLOURED_NAMES = {
    *("grinning face", "slightly smiling face", "ghost", "alien", "robot", "skull", "thumbs up", "hamburger"),
    *("pizza", "star", "umbrella", "droplet", "balloon", "beer mug", "wine glass", "fire", "cloud", "baby"),
    *("grinning cat", "smiling face with sunglasses", "crying face", "angry face", "fish", "egg", "bread"),
}

HELD_OUT = (
    *(("blue", "dog face"), ("green", "cat face"), ("purple", "banana"), ("red", "frog"), ("blue", "strawberry")),
    *(("pink", "rocket"), ("green", "star"), ("purple", "pizza"), ("blue", "rose"), ("green", "octopus")),
    *(("yellow", "car"), ("orange", "whale"), ("green", "house"), ("blue", "apple"), ("pink", "guitar")),
    *(("purple", "tree"), ("red", "owl"), ("green", "balloon"), ("pink", "cactus"), ("blue", "lion")),
    *(("orange", "butterfly"), ("yellow", "t-shirt"), ("purple", "pear"), ("red", "umbrella")),
)
"""Pairs of a colour and a name that training never sees together, to judge whether the model can combine words."""

_COLOUR_WORDS = {*HUES, "black", "white", "brown", "grey", "light"}


@dataclass(frozen=True)
class Example:
    """One picture (64x64x3, uint8), the captions that may stand for it, each with its weight, and its own weight."""

    pixels: np.ndarray
    captions: tuple[tuple[str, float], ...]
    weight: float


def read_emojibase(path: Path) -> list[dict]:
    """Read ``en/data.json`` from emojibase-data: the ``npm pack`` tarball, or the unpacked folder."""
    if path.is_dir():
        return json.loads((path / "en" / "data.json").read_text(encoding="utf-8"))
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/en/data.json")
        assert member is not None
        return json.load(member)


def draw(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Draw one emoji centred on white, or return None where the font has no single glyph for it."""
    if font.getlength(text) > 1.2 * font.getlength("\N{GRINNING FACE}"):
        return None
    image = Image.new("RGB", (140, 140), (255, 255, 255))
    ImageDraw.Draw(image).text((2, 4), text, font=font, embedded_color=True)
    rows, columns = np.where((np.asarray(image) < 250).any(-1))
    if len(rows) < 50:
        return None
    middle = (columns.min() + columns.max()) // 2, (rows.min() + rows.max()) // 2
    canvas = Image.new("RGB", (136, 136), (255, 255, 255))
    canvas.paste(image, (68 - middle[0], 68 - middle[1]))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def recolour(pixels: np.ndarray, colour: str) -> np.ndarray | None:
    """Turn the main colour of a picture into another one; None where the picture has no main colour.

    Only pixels whose hue is close to the most frequent one change, so an apple keeps its green leaf.
    """
    hsv = np.asarray(Image.fromarray(pixels).convert("HSV")).astype(np.float32) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    weight = np.where((saturation > 0.25) & (value > 0.2), saturation, 0.0)
    inked = (pixels < 245).any(-1).sum()
    histogram = np.histogram(hue, bins=36, range=(0, 360), weights=weight)[0]
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    main = 10 * int(smooth.argmax()) + 5
    distance = np.abs((hue - main + 180) % 360 - 180)
    near = np.clip((55 - distance) / 20, 0, 1) * np.clip((saturation - 0.08) / 0.12, 0, 1)
    if (near > 0.5).sum() < 0.3 * inked:
        return None
    strong = near > 0.5
    level = float(value[strong].mean())
    wanted = 0.95 if colour in ("yellow", "orange", "pink") else 0.8
    richness = 0.55 if colour == "pink" else 0.85
    turned = np.stack(
        [
            (HUES[colour] + 0.3 * ((hue - main + 180) % 360 - 180)) % 360 / 360,
            np.clip(saturation * max(0.8, richness / max(float(saturation[strong].mean()), 0.2)), 0, 1)
            if colour != "pink"
            else np.clip(saturation * richness / max(float(saturation[strong].mean()), 0.2), 0, 1),
            np.clip(value * min(max(wanted / level, 0.95), 1.6), 0, 1),
        ],
        -1,
    )
    painted = np.asarray(Image.fromarray((turned * 255).astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    mixed = near[..., None] * painted + (1 - near[..., None]) * pixels
    return mixed.round().clip(0, 255).astype(np.uint8)


def load_pictures(emojibase: Path, font_file: Path, groups: tuple[int, ...]) -> np.ndarray:
    """Draw every emoji of the given Emojibase groups, for the image autoencoder, which needs no captions."""
    font = ImageFont.truetype(str(font_file), 109)
    drawn = [draw(e["emoji"], font) for e in read_emojibase(emojibase) if e.get("group") in groups]
    return np.stack([pixels for pixels in drawn if pixels is not None])


def load_examples(emojibase: Path, font_file: Path) -> tuple[list[Example], int]:
    """Return all examples, the plain emoji first, and the number of the plain ones."""
    if not features.check("raqm"):
        raise RuntimeError("Pillow needs raqm to draw emoji sequences")
    font = ImageFont.truetype(str(font_file), 109)
    kept: list[tuple[dict, str, np.ndarray]] = []
    for entry in sorted(read_emojibase(emojibase), key=lambda e: e.get("order", 1 << 30)):
        name = entry["label"].lower()
        if not (entry.get("subgroup") in SUBGROUPS or name in EXTRA) or SKIP.search(name):
            continue
        pixels = draw(entry["emoji"], font)
        if pixels is not None:
            kept.append((entry, name, pixels))
    names = {name for _, name, _ in kept}
    common = Counter(tag for entry, _, _ in kept for tag in entry.get("tags", []))
    plain, recoloured = [], []
    for entry, name, pixels in kept:
        tags = [tag for tag in entry.get("tags", []) if tag.isascii() and tag != name]
        aliases = ALIASES.get(name, ())
        # A tag stands alone only where it says which picture is meant: it is rare, and no other picture's name.
        alone = [tag for tag in tags if common[tag] <= 3 and tag not in names]
        weight = FAMILIAR_WEIGHT if name in FAMILIAR else 1.0
        plain.append(Example(pixels, tuple(_captions(name, aliases, alone, tags)), weight))
        words = name.split()
        base = " ".join(words[1:]) if words[0] in _COLOUR_WORDS and len(words) > 1 else name
        if base in names and base != name:
            continue  # a colour variant of a picture that is itself recoloured
        if entry.get("subgroup") not in RECOLOURED and name not in RECOLOURED_NAMES:
            continue
        called = [base, *(a for a in aliases if a not in names and a.split()[0] not in _COLOUR_WORDS)]
        for colour in HUES:
            free = [n for n in called if f"{colour} {n}" not in names]
            if any((colour, n) in HELD_OUT for n in called) or not free:
                continue
            painted = recolour(pixels, colour)
            if painted is not None:
                captions = [("", 0.1)]
                for n in free:
                    captions += [(f"{colour} {n}", 0.8 / len(free)), (f"a {colour} {n}", 0.1 / len(free))]
                recoloured.append(Example(painted, tuple(captions), weight))
    return plain + recoloured, len(plain)


def _captions(name: str, aliases: tuple[str, ...], alone: list[str], tags: list[str]) -> list[tuple[str, float]]:
    """Weigh the captions of one plain emoji: mostly its name, some tags, and the empty one for guidance."""
    captions = [("", 0.1)]
    names = [name, *aliases]
    for text in names:
        share = 1 / len(names)
        captions += [(text, 0.55 * share), (f"a {text}", 0.04 * share), (f"{text} emoji", 0.03 * share)]
        captions.append((f"a picture of a {text}", 0.03 * share))
    if alone:
        captions += [(tag, 0.12 / len(alone)) for tag in alone]
    if tags:
        captions += [(f"{name} {tag}", 0.12 / len(tags)) for tag in tags]
    return captions
