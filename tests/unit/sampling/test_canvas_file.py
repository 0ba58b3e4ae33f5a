"""Canvas files: what they amount to, and every way in which they can be wrong."""

import json

import pytest
from PIL import Image

from torchtitan_mixtures.sampling.canvas import Rectangle, Region, Reroll
from torchtitan_mixtures.sampling.canvas_file import build_canvas, read_canvas_file
from torchtitan_mixtures.sampling.canvas_frame import Frame

CLASSES = Frame(32, 1, 0, ("ape", "bee", "cat", "bee"), 1.5, "", "gaussian")
PROMPTS = Frame(32, 8, 16, None, 4.0, "blurry", "gaussian")


def write(folder, text, name="canvas.toml"):
    (folder / name).write_text(text)
    return folder / name


def canvas_of(folder, text, frame=PROMPTS, name="canvas.toml"):
    return build_canvas(read_canvas_file(write(folder, text, name)), frame)


WHOLE = """
width = 64
height = 32
kernel = "quartic"
seed = 4
num_steps = 7
guidance = 2

[background]
prompt = "a field"
overlap = 16

[[regions]]
left = 0
top = 0
prompt = "a fox"

[[regions]]
left = 32
top = 16
width = 32
height = 16
prompt = "a house"
guidance = 1.0
kernel = "constant"
weight = 3
seed = 8

[[regions]]
left = 16
top = 0
prompt = "a tree"
negative_prompt = "a bush"

[[images]]
left = 8
top = 8
width = 24
height = 16
path = "guide.png"
strength = 0.5

[[rerolls]]
left = 0
top = 0
seed = 3
epsilon = 0.25

[[rerolls]]
left = 0
top = 0
width = 8
height = 8
seed = 3
"""

WHOLE_JSON = {
    "width": 64, "height": 32, "kernel": "quartic", "seed": 4, "num_steps": 7, "guidance": 2,
    "background": {"prompt": "a field", "overlap": 16},
    "regions": [
        {"left": 0, "top": 0, "prompt": "a fox"},
        {"left": 32, "top": 16, "width": 32, "height": 16, "prompt": "a house", "guidance": 1.0,
         "kernel": "constant", "weight": 3, "seed": 8},
        {"left": 16, "top": 0, "prompt": "a tree", "negative_prompt": "a bush"},
    ],
    "images": [
        {"left": 8, "top": 8, "width": 24, "height": 16, "path": "guide.png", "strength": 0.5}
    ],
    "rerolls": [
        {"left": 0, "top": 0, "seed": 3, "epsilon": 0.25},
        {"left": 0, "top": 0, "width": 8, "height": 8, "seed": 3},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_file_says_all_that_is_drawn(kind, tmp_path):
    Image.new("RGB", (5, 5), "red").save(tmp_path / "guide.png")
    text = WHOLE if kind == "toml" else json.dumps(WHOLE_JSON)
    file = read_canvas_file(write(tmp_path, text, f"canvas.{kind}"))
    assert file.settings == {"seed": 4, "num_steps": 7, "guidance": 2.0}
    canvas = build_canvas(file, PROMPTS)
    assert (canvas.width, canvas.height) == (64, 32)
    assert canvas.regions == (
        Region("regions[0]", Rectangle(0, 0, 32, 32), "a fox", 4.0, "quartic", 1.0, None, "blurry"),
        Region("regions[1]", Rectangle(32, 16, 32, 16), "a house", 1.0, "constant", 3.0, 8, ""),
        Region("regions[2]", Rectangle(16, 0, 32, 32), "a tree", 4.0, "quartic", 1.0, None,
               "a bush"),
        *(
            Region(f"background[{i}]", Rectangle(left, 0, 32, 32), "a field", 4.0, "quartic", 0.1,
                   None, "blurry")
            for i, left in enumerate((0, 16, 32))
        ),
    )  # fmt: skip
    (image,) = canvas.images
    assert (image.rectangle, image.strength) == (Rectangle(8, 8, 24, 16), 0.5)
    assert image.path == tmp_path / "guide.png" and image.picture.getpixel((0, 0)) == (255, 0, 0)
    assert canvas.rerolls == (
        Reroll(Rectangle(0, 0, 32, 32), 3, 0.25),
        Reroll(Rectangle(0, 0, 8, 8), 3, None),
    )


def test_classes_are_said_by_number_or_name(tmp_path):
    canvas = canvas_of(
        tmp_path,
        'width = 64\nheight = 32\nregions = [{left = 0, top = 0, class_label = "cat"}, '
        "{left = 32, top = 0, class_label = 3}]",
        CLASSES,
    )
    assert [region.subject for region in canvas.regions] == [2, 3]
    assert {region.guidance for region in canvas.regions} == {1.5}


def test_a_grid_is_regions_that_overlap_and_decides_the_size(tmp_path):
    canvas = canvas_of(
        tmp_path,
        'kernel = "constant"\n[grid]\nprompts = [["a", "b", "c"], ["d", "e", "f"]]\n'
        "tile_width = 48\ncolumn_overlap = 24\nrow_overlap = 8\nguidance = 3\nweight = 2",
    )
    assert (canvas.width, canvas.height) == (48 + 2 * 24, 32 + 24)
    assert [(r.subject, r.rectangle) for r in canvas.regions] == [
        (letter, Rectangle(left, top, 48, 32))
        for (top, left), letter in zip(
            [(top, left) for top in (0, 24) for left in (0, 24, 48)], "abcdef", strict=True
        )
    ]
    first = canvas.regions[4]
    assert (first.name, first.guidance, first.weight, first.kernel) == (
        "grid.prompts[1][1]", 3.0, 2.0, "constant",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tiles", "size"),
    [
        ("tile_width = 640\ntile_height = 640\nprompts = [['a', 'b', 'c']]", (1408, 640)),
        ("tile_width = 512\ntile_height = 768\nprompts = [['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', "
         "'i', 'j']]", (2816, 768)),
    ],
)  # fmt: skip
def test_grids_have_the_published_sizes(tiles, size, tmp_path):
    canvas = canvas_of(tmp_path, f"[grid]\noverlap = 256\n{tiles}")
    assert (canvas.width, canvas.height) == size
    assert canvas_of(tmp_path, f"width = {size[0]}\n[grid]\noverlap = 256\n{tiles}") == canvas


def test_tiles_overlap_by_half_if_nothing_is_said(tmp_path):
    canvas = canvas_of(tmp_path, "[grid]\nclass_labels = [['ape', 1]]", CLASSES)
    assert [region.rectangle.left for region in canvas.regions] == [0, 16]
    background = 'width = 64\nheight = 64\n[background]\nclass_label = "ape"'
    places = [r.rectangle for r in canvas_of(tmp_path, background, CLASSES).regions]
    assert [(p.left, p.top) for p in places] == [(x, y) for y in (0, 16, 32) for x in (0, 16, 32)]


def test_a_background_is_no_larger_than_the_canvas(tmp_path):
    canvas = canvas_of(tmp_path, 'width = 48\nheight = 16\n[background]\nprompt = "x"')
    assert [r.rectangle for r in canvas.regions] == [
        Rectangle(0, 0, 32, 16),
        Rectangle(16, 0, 32, 16),
    ]


SIZE = "width = 64\nheight = 32\n"
REST = '[background]\nprompt = "x"\n'


def of_region(text):
    return f'{SIZE}{REST}[[regions]]\nleft = 0\ntop = 0\nprompt = "x"\n{text}'


WRONG = [
    # what the file is
    ("width = ", "--canvas FILE: is not TOML (Invalid value"),
    ('{"width": 3}', "is not TOML (Invalid statement (at line 1, column 1)); a file of JSON"),
    # keys and kinds
    ("height = 32", "FILE: has no width; add width, a whole number."),
    ("width = 64", "FILE: has no height"),
    (SIZE + "colour = 3\n" + REST, "FILE: colour: unknown key; there are sampler, "),
    ("width = 6.5\nheight = 3", "FILE: width = 6.5: must be a whole number."),
    ("width = true\nheight = 3", "FILE: width = True: must be a whole number."),
    ("width = 0\nheight = 32", "FILE: width = 0: must be from 1 to 16384."),
    ("width = 65536\nheight = 32", "FILE: width = 65536: must be from 1 to 16384."),
    ("width = 62\nheight = 32", "FILE: width = 62: must be a multiple of 8, the pixels to a cell"),
    (SIZE + "regions = 3", "FILE: regions = 3: must be a list."),
    (SIZE + "regions = [3]", "FILE: regions[0]: must be a table of keys and values."),
    (SIZE + "background = 'x'", "FILE: background: must be a table"),
    (of_region("size = 3"), "FILE: regions[0].size: unknown key; there are left, width, top, "),
    (of_region("weight = 'x'"), "FILE: regions[0].weight = 'x': must be a finite number."),
    (of_region("weight = nan"), "FILE: regions[0].weight = nan: must be a finite number."),
    (of_region("weight = 1" + 400 * "0"), "FILE: regions[0].weight = 1000"),
    (of_region("weight = -1"), "FILE: regions[0].weight = -1.0: must be 0 or more."),
    (of_region("guidance = 1e4"), "FILE: regions[0].guidance = 10000.0: must be from 0 to 1000."),
    (of_region("seed = -1"), "FILE: regions[0].seed = -1: must be 0 or more."),
    (of_region("kernel = 'box'"), "regions[0].kernel = 'box': must be one of constant, gaussian,"),
    ("kernel = 'box'\n" + SIZE + REST, "FILE: kernel = 'box': must be one of constant, gaussian,"),
    # settings
    ("seed = -1\n" + SIZE + REST, "FILE: seed = -1: must be 0 or more."),
    ("num_steps = 0\n" + SIZE + REST, "FILE: num_steps = 0: must be 1 or more."),
    ("num_steps = 'ddim50'\n" + SIZE + REST, "FILE: num_steps = 'ddim50': must be a whole number."),
    ("guidance = inf\n" + SIZE + REST, "FILE: guidance = inf: must be a finite number."),
    # places
    (SIZE + "[[regions]]\ntop = 0\nprompt = 'x'", "FILE: regions[0]: has no left; add left, a"),
    (of_region("").replace("left = 0", "left = -8"), "regions[0].left = -8: must be 0 or more."),
    (of_region("").replace("left = 0", "left = 13"), "regions[0].left = 13: must be a multiple of"),
    (of_region("").replace("left = 0", "left = 40"),
     "regions[0].left = 40: the part ends at 72, beyond the canvas, whose width is 64."),
    (of_region("height = 48"),
     "regions[0].height = 48: the part ends at 48, beyond the canvas, whose height is 32."),
    (of_region("width = 24"), "regions[0].width = 24: must be a multiple of 16 pixels, as"),
    (of_region("width = 0"), "regions[0].width = 0: must be from 1 to 16384."),
    # subjects
    (SIZE + "[[regions]]\nleft = 0\ntop = 0", "FILE: regions[0]: has no prompt; the model draws "),
    (of_region("class_label = 3"),
     "FILE: regions[0].class_label: the model draws images of prompts; use prompt instead."),
    (of_region("").replace('prompt = "x"\n', 'prompt = " "\n'), "prompt = ' ': must be a text"),
    (of_region("").replace('prompt = "x"\n', "prompt = 3\n"), "prompt = 3: must be a text that is"),
    (of_region("negative_prompt = 3"), "regions[0].negative_prompt = 3: must be a text."),
    # coverage
    (SIZE, "FILE: no region with a weight covers 2,048 of 64 x 32 pixels (100.0%), the first at "
           "left = 0, top = 0; add a region there, or a [background]."),
    (SIZE + "[[regions]]\nleft = 0\ntop = 0\nheight = 16\nprompt = 'x'",
     "covers 1,536 of 64 x 32 pixels (75.0%), the first at left = 32, top = 0;"),
    (SIZE + "[background]\nprompt = 'x'\nweight = 0", "covers 2,048 of 64 x 32 pixels (100.0%)"),
    # grids and backgrounds
    ("[grid]\noverlap = 8", "FILE: grid: has no prompts; add prompts, a list."),
    ("[grid]\nprompts = []", "FILE: grid.prompts = []: must be a list of rows"),
    ("[grid]\nprompts = ['a']", "FILE: grid.prompts = ['a']: must be a list of rows"),
    ("[grid]\nprompts = [['a', 'b'], ['c']]", "must be a list of rows, lists that are equally"),
    ("[grid]\nprompts = [['a', 3]]", "FILE: grid.prompts[0][1] = 3: must be a text"),
    ("[grid]\nclass_labels = [[1]]", "FILE: grid.class_labels: the model draws images of prompts"),
    ("[grid]\nprompts = [['a', 'b']]\noverlap = 32", "grid.overlap = 32: must be from 0 to 24."),
    ("[grid]\nprompts = [['a', 'b']]\nrow_overlap = 4", "row_overlap = 4: must be a multiple of 8"),
    ("[grid]\nprompts = [['a']]\ntile_width = 40", "tile_width = 40: must be a multiple of 16"),
    ("[grid]\nprompts = [['a']]\nseeds = 3", "FILE: grid.seeds: unknown key"),
    ("width = 40\n[grid]\nprompts = [['a']]", "FILE: width = 40: the grid makes it 32; leave"),
    (f"[grid]\noverlap = 0\nprompts = [{['a'] * 600}]", "FILE: grid: its width is 19200; it"),
    (SIZE + REST + "width = 80", "FILE: background.width = 80: must be at most 64, as the canvas."),
    (SIZE + REST + "overlap = 32", "FILE: background.overlap = 32: must be from 0 to 24."),
    (SIZE + REST + "left = 3", "FILE: background.left: unknown key"),
    # images and rerolls
    (SIZE + REST + "[[images]]\nleft = 0\ntop = 0\npath = 'none.png'",
     "FILE: images[0].path = 'none.png': cannot be read (No such file or directory)."),
    (SIZE + REST + "[[images]]\nleft = 0\ntop = 0\npath = '.'", "images[0].path = '.': cannot be"),
    (SIZE + REST + "[[images]]\nleft = 0\ntop = 0\npath = 'canvas.toml'",
     "FILE: images[0].path = 'canvas.toml': cannot be read as an image ("),
    (SIZE + REST + "[[images]]\nleft = 0\ntop = 0\npath = 'x'\nstrength = 1.5",
     "FILE: images[0].strength = 1.5: must be from 0 to 1."),
    (SIZE + REST + "[[images]]\nleft = 0\ntop = 0", "FILE: images[0]: has no path"),
    (SIZE + REST + "[[rerolls]]\nleft = 0\ntop = 0", "FILE: rerolls[0]: has no seed"),
    (SIZE + REST + "[[rerolls]]\nleft = 0\ntop = 4\nseed = 1", "rerolls[0].top = 4: must be"),
    (SIZE + REST + "[[rerolls]]\nleft = 0\ntop = 0\nseed = 1\nepsilon = -1",
     "FILE: rerolls[0].epsilon = -1.0: must be from 0 to 1e+06."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_named(text, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        canvas_of(tmp_path, text)
    said = str(raised.value)
    assert message.replace("FILE", str(tmp_path / "canvas.toml")) in said
    assert str(tmp_path / "canvas.toml") in said and "\n" not in said


WRONG_CLASSES = [
    ("prompt = 'x'", "regions[0].prompt: the model draws images of classes; use class_label"),
    ("", "regions[0]: has no class_label; the model draws images of classes."),
    ("class_label = 4", "regions[0].class_label = 4: must be from 0 to 3."),
    ("class_label = -1", "regions[0].class_label = -1: must be from 0 to 3."),
    ("class_label = true", "class_label = True: must be a number or the name of one class of ape,"),
    ("class_label = 'dog'", "class_label = 'dog': must be a number or the name of one class of"),
    ("class_label = 'bee'", "class_label = 'bee': must be a number or the name of one class of"),
    ("class_label = 1\nwidth = 16", "regions[0].width = 16: the model takes squares of 32 pixels "
     "only; leave it out."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG_CLASSES)
def test_what_is_wrong_for_a_model_of_classes_is_named(text, message, tmp_path):
    with pytest.raises(ValueError) as raised:
        canvas_of(tmp_path, f"{SIZE}[[regions]]\nleft = 0\ntop = 0\n{text}", CLASSES)
    assert message in str(raised.value)


def test_a_model_of_classes_has_no_negative_prompt(tmp_path):
    frame = Frame(32, 1, 0, ("ape",), 1.5, "blurry", "gaussian")
    with pytest.raises(ValueError, match=r"canvas.toml: negative_prompt = 'blurry': the model dra"):
        canvas_of(tmp_path, SIZE + "[[regions]]\nleft = 0\ntop = 0\nclass_label = 0", frame)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^--canvas .*none.toml: cannot be read as text \(No such"
    ):
        read_canvas_file(tmp_path / "none.toml")
    (tmp_path / "canvas.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"canvas.toml: cannot be read as text \(not UTF-8\)"):
        read_canvas_file(tmp_path / "canvas.toml")
    for text, message in (("width = 3", "is not JSON"), ("[3]", "must be a table of keys")):
        path = write(tmp_path, text, "canvas.json")
        with pytest.raises(ValueError, match=rf"canvas.json: {message}"):
            read_canvas_file(path)
