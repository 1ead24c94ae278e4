"""The built-in data sets glyphs and glyphs_colour are characters drawn from the fonts that ship with matplotlib.

Train on Latin letters and symbols, validate on Cyrillic and Greek, test on Armenian and Georgian: unseen
scripts. A picture is a function of data set, character and index alone: the same on every run.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.sources import DataSet, Source
from preprocess.writing import Picture
from utils.errors import UserError

# Chosen once and written down, because classes must not change with the fonts or libraries of a machine.
# Candidates were letters that do not decompose (no accents) and symbols of categories Sm and So, in at least
# 8 of the faces below. They were taken in the order Latin, Armenian and Georgian, Cyrillic and Greek,
# symbols, and one was dropped as a look-alike when its correlation with one already kept was 0.84 or more.
# Correlation: ink boxes scaled to 14 pixels, slightly blurred; mean over the faces that have both, for
# upright and slanted faces, the higher of the two; the highest for either turned by -12, 0 and 12 degrees.
# Of the symbols left, every fifth is here.
LATIN = (
    "ABCDEGHIJKLMNOPQRSTUVWXYZabdefgjkmnpqrtuyÆÞßæðøþĸŊŋŒƁƄƆƇƈƊƎƏƐƒƔƕƖƛƜƝƢƣƤƦƧƩƪƫƴƷ"
    "ƸƺƻƾǁǂǶȜȡȢȤȴȵȸȹȺȻȾȿɀɁɂɆɊɍɐɑɒɕɖɗɘɚɜɝɞɟɠɤɦɧɨɬɮɯɰɱɲɳɵɷɸɹɺɻɼɾɿʁʂʆʇʉʊʋʌʍʎʐʑʓʕʗʚʛʝʞʡ"
    "ʣʤʦʧʨʩʪʫʬʭʮᴃᴌᴎᴑᴒᴖᴗᴙᴚᴝᴞᴟᵻᶅẞỺỻⱤⱧⱨⱩⱪⱫⱮⱱⱲⱵⱷꜢꜤꜦꜨꜰꜴꜸꜹꜼꜽꜿꝆꝇꝎꞀꞂꞌꞍꞐꞑꞪꟽꟿ"
)
SYMBOLS = "+¦×⅃↓↜↬↲↷↾⇆⇋⇗⇥⇰⇻∊∑√∠∵∺≅≐≙≟≧≺≿⊊⊑⊗⊣⊩⊴⋆⋛⋦⌁⌆⌑⌥⍽⎨␣└┭╒╘╤╩▂▜▤▭▵▼◇◎◔◞◣◴◿♀♅♢♪⟰⟻⧻⬉⬖"
CYRILLIC_AND_GREEK = "ЂЉЊЋЏДЖЛЩЪЫЮЯдлмцъыьюњћѣѤѪѬѰѱҍґҔҖҘқҠҤҦҪҬҲҴҶҺӄӌӶԒԔꙐꙔꙖͲͳͼΔΞΨΩαβγζνπσφχψωϏϗϙϛϝϞϠϡϺϻ"
ARMENIAN_AND_GEORGIAN = (
    "ԲԳԴԵԶԷԸԹԺԻԽԾԿՀՁՃՄՆՇՈՊՌՎՓՔՖըթխկճմնչջփքֆႠႡႢႣႤႥႦႧႨႩႪႫႭႮႯႰႲႴႵႶႷႸႺႼႽႾႿჁჂჄჅადეზთიკლნ"
    "ოჟრსტფქღყშცძწჯჰჱჲჳჴჵჶჸჹჺⴀⴁⴂⴃⴄⴅⴆⴈⴌⴎⴏⴐⴒⴓⴕⴖⴗⴘⴙⴛⴜⴝⴟⴠⴡⴢⴣⴤⴥ"
)
CHARACTERS = {"train": LATIN + SYMBOLS, "val": CYRILLIC_AND_GREEK, "test": ARMENIAN_AND_GEORGIAN}

FACES = ("DejaVu*.ttf", "STIXGeneral*.ttf")
FACES_PER_CHARACTER = 8  # at least
IMAGES_PER_CLASS = 40
SIDE = 32  # pixels; pictures are drawn at twice that and averaged down
FONT_SIZE = 64

Colours = Callable[[np.random.RandomState], tuple[np.ndarray, np.ndarray]]


class Style(NamedTuple):
    """A style says how far the pictures of a data set vary; each of them draws uniformly from every range."""

    name: str
    seed: int
    rotation: float  # degrees, to either side
    shear: float  # horizontal, to either side
    extent: tuple[float, float]  # longer side of the glyph's ink box, pixels
    stretch: float  # factor by which width or height may differ from the font's
    shift: float  # pixels, to either side; less where the glyph would leave the picture
    colours: Colours  # random state -> ink (3,), paper (SIDE or 1, SIDE or 1, 3), both 0 to 255
    noise: float  # standard deviation, grey levels


def dark_on_light(random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    return random.uniform(0, 90, 3), random.uniform(200, 255, (1, 1, 3))


def any_on_texture(random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Return paper of any colour with blotches of any size, and ink that differs from it by 100 levels or more."""
    paper = random.uniform(0, 255, 3)
    ink = (paper + random.uniform(100, 156, 3)) % 256
    cells = random.randint(3, 9)
    blotches = np.clip(paper + random.uniform(-50, 50, (cells, cells, 3)), 0, 255).astype(np.uint8)
    texture = Image.fromarray(blotches).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return ink, np.asarray(texture, np.float64)


PLAIN = Style("glyphs", 0, 15, 0.15, (18, 22), 1.1, 3, dark_on_light, 5)
COLOUR = Style("glyphs_colour", 1, 25, 0.25, (16, 24), 1.25, 4, any_on_texture, 8)


def pictures(style: Style, _: Path) -> Iterator[Picture]:
    """Yield the pictures of every class of `style`. UserError where the installed matplotlib's fonts lack a character.

    Each is the same whatever was drawn before.
    """
    faces = faces_of("".join(CHARACTERS.values()))
    random = np.random.RandomState()  # its streams are the same in every numpy
    for split, character in [(split, character) for split, each in CHARACTERS.items() for character in each]:
        masks = [ink_mask(character, face) for face in faces[character]]
        for index in range(IMAGES_PER_CLASS):
            random.seed([style.seed, ord(character), index])
            pixels = picture(style, masks[random.randint(len(masks))], random)
            yield Picture(split, class_name(character), f"{index:02d}.png", pixels)


def class_name(character: str) -> str:
    """Return the folder of a character, such as U+0416_CYRILLIC_CAPITAL_LETTER_ZHE."""
    return f"U+{ord(character):04X}_{unicodedata.name(character).replace(' ', '_').replace('-', '_')}"


def faces_of(characters: str) -> dict[str, list[ImageFont.FreeTypeFont]]:
    """Return the faces that have each character. UserError where they are fewer than 8: no class gets lost."""
    import matplotlib  # here, because entry points import this module and most never draw
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = sorted(path for pattern in FACES for path in folder.glob(pattern))
    basic = ImageFont.Layout.BASIC
    fonts = [(ImageFont.truetype(file, FONT_SIZE, 0, "", basic), FT2Font(str(file)).get_charmap()) for file in files]
    faces = {character: [font for font, has in fonts if ord(character) in has] for character in characters}
    lacking = [character for character in characters if len(faces[character]) < FACES_PER_CHARACTER]
    if lacking:
        raise UserError(
            f"matplotlib {matplotlib.__version__} has fewer than {FACES_PER_CHARACTER} DejaVu and STIX faces "
            f"with {class_name(lacking[0])} ({len(lacking)} such characters) in {folder}. "
            "Install the matplotlib of requirements.txt"
        )
    return faces


def ink_mask(character: str, face: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the character's ink, white on black, cut to its ink box."""
    canvas = Image.new("L", (4 * FONT_SIZE, 4 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), character, fill=255, font=face)
    return canvas.crop(canvas.getbbox())


def picture(style: Style, mask: Image.Image, random: np.random.RandomState) -> np.ndarray:
    """Return (SIDE, SIDE, 3) uint8."""
    coverage = place(style, mask, random)[..., None]
    ink, paper = style.colours(random)
    pixels = paper + (ink - paper) * coverage + random.normal(0, style.noise, (SIDE, SIDE, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def place(style: Style, mask: Image.Image, random: np.random.RandomState) -> np.ndarray:
    """Return how much of each pixel the distorted and shifted glyph covers, 0 to 1: (SIDE, SIDE)."""
    turn, lean, size, wide, tall, right, down = random.uniform(-1, 1, 7)
    width, height = mask.size
    scale = np.interp(size, (-1, 1), style.extent) / max(width, height)
    scale_x, scale_y = scale * style.stretch ** (wide / 2), scale * style.stretch ** (tall / 2)
    angle, shear = math.radians(style.rotation * turn), style.shear * lean
    cos, sin = math.cos(angle), math.sin(angle)
    # [[a, b], [c, d]] = rotation x shear x scale: mask pixels -> picture pixels. By hand: as numpy matrices
    # these would wake the BLAS's threads 20,000 times.
    a, b = cos * scale_x, (cos * shear - sin) * scale_y
    c, d = sin * scale_x, (sin * shear + cos) * scale_y
    x = SIDE / 2 + right * _slack(style, abs(a) * width + abs(b) * height)
    y = SIDE / 2 + down * _slack(style, abs(c) * width + abs(d) * height)
    # Pillow wants the way back, here from the pixels of a picture of twice the side.
    det = 2 * (a * d - b * c)
    back_x = d / det, -b / det, width / 2 - 2 * (d * x - b * y) / det
    back_y = -c / det, a / det, height / 2 - 2 * (a * y - c * x) / det
    double, bicubic = (2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC
    large = mask.transform(double, Image.Transform.AFFINE, (*back_x, *back_y), bicubic)
    return np.asarray(large.reduce(2), np.float64) / 255


def _slack(style: Style, side: float) -> float:
    """Return how far a glyph with an ink box of `side` pixels may be shifted: to one pixel from the edge."""
    return min(max((SIDE - side) / 2 - 1, 0), style.shift)


DATA_SETS = tuple(DataSet(style.name, (Source((), "", partial(pictures, style)),)) for style in (PLAIN, COLOUR))
