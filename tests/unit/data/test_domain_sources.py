"""What may divide images into domains, for every source of them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.jobs import debug_job
from tests.unit.data.domain_jobs import TRAIN, VALIDATION, domains_of, emoji_job, use_new_process
from tests.unit.data.image_jobs import make_job, save_tiny_vae, write_folder
from tests.unit.data.prompt_jobs import captioned_job, write_captioned
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.data.domain_file import write_domain_file
from torchtitan_mixtures.data.domains import check_domains, clean_names, domain_names, open_domains
from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.encode_latents import Encoding, encode
from torchtitan_mixtures.data.image_data import image_spec, open_images
from torchtitan_mixtures.data.image_loader import (
    build_image_dataloader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.data.prompt_loader import build_prompt_dataloader, open_prompted_images


@pytest.fixture(autouse=True)
def fake_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_new_process(tmp_path, monkeypatch)


# --- sources --------------------------------------------------------------------------------------


def test_classes_may_name_styles():
    spec = image_spec(make_job(class_of="style", image_size=16))
    assert spec.class_names == STYLES
    images = open_images(make_job(class_of="style", image_size=16), TRAIN, "train")
    drawings = EmojiCorpus.load().drawings("train")
    assert images.labels().tolist() == [STYLES.index(d.style) for d in drawings]
    both = make_job(class_of="style+group", image_size=16)
    names = image_spec(both).class_names
    assert len(names) == 24 and names[:2] == ("noto/Smileys & Emotion", "noto/People & Body")
    for split in ("train", "unseen_concept"):
        images = open_images(both, TRAIN, split)
        for label, drawing in zip(images.labels(), EmojiCorpus.load().drawings(split), strict=True):
            assert names[label] == f"{drawing.style}/{drawing.concept.group}"


def test_classes_of_emoji_are_domains_under_clean_names():
    job = emoji_job(domains="class")
    assert domain_names(job)[3:5] == ("Food_Drink", "Travel_Places")
    images = open_images(job, TRAIN, "unseen_style")
    labels = [images.read(index).label for index in range(146)]
    assert domains_of(job, "unseen_style") == labels
    assert domain_names(make_job()) == ()


def test_folders_and_latents_have_the_domains_of_their_classes_and_files(tmp_path):
    pictures = write_folder(tmp_path / "pictures" / "train", count=3).parent
    vae = str(save_tiny_vae(tmp_path / "vae"))
    encode(Encoding(str(pictures), vae, tmp_path / "latents", size=16), lambda line: None)
    for path in (pictures, tmp_path / "latents"):
        job = make_job(source="folder", path=str(path), image_size=8, domains="class")
        assert domain_names(job) == ("cat", "dog")
        assert domains_of(job) == [0, 0, 0, 1, 1, 1]
        images = open_images(job, TRAIN, "train")
        keys = [images.relative_key(index) for index in range(6)]
        assert str(tmp_path) not in "".join(keys)
        if path == pictures:
            assert keys[:3] == ["cat/0.png", "cat/2.png", "cat/more/1.png"]
        entries = {key: number % 3 for number, key in enumerate(keys)}
        write_domain_file(tmp_path / "domains.json", "xyz", {"train": entries})
        job.multimodal.domains = str(tmp_path / "domains.json")
        assert domain_names(job) == ("x", "y", "z")
        assert domains_of(job) == [0, 1, 2, 0, 1, 2]


def save_rows(path: Path, feature: Any, **values: list[Any]) -> str:
    """Splits with these domains as `save_to_disk` writes them, classes 0 and 1 in turn."""
    splits = {}
    for split, domains in values.items():
        count = len(domains)
        rows = {
            "image": [{"bytes": b"", "path": None}] * count,
            "label": [number % 2 for number in range(count)],
            "caption": [f"text {number}" for number in range(count)],
            "origin": domains,
        }
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.Value("int64"),
                "caption": datasets.Value("string"),
                "origin": feature,
            }
        )
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return str(path)


def column_job(path: str, **values: Any) -> Any:
    defaults = {"source": "datasets", "path": path, "image_size": 8, "domain_column": "origin"}
    return make_job(**{**defaults, "validation_splits": ["val"], **values})


@pytest.mark.parametrize(
    ("feature", "values", "names", "labels"),
    [
        (datasets.Value("string"), ["web", "a & b", "web"], ("a_b", "web"), [1, 0, 1]),
        (datasets.Value("int32"), [30, 4, 4], ("4", "30"), [1, 0, 0]),
        (datasets.ClassLabel(names=["p", "q", "r"]), [2, 0, 2], ("p", "q", "r"), [2, 0, 2]),
    ],
)
@pytest.mark.parametrize("is_prompted", [False, True])
def test_a_column_names_domains(tmp_path, feature, values, names, labels, is_prompted):
    path = save_rows(tmp_path / "data", feature, train=values, val=values[:1])
    job = column_job(path)
    assert domain_names(job) == names
    options = {"is_prompted": True} if is_prompted else {}
    assert domains_of(job, **options) == labels
    open_split = open_prompted_images if is_prompted else open_images
    images = open_split(job, VALIDATION, "val")
    of_val = open_domains(job, VALIDATION, "val", images, **options)
    assert of_val is not None and of_val.labels.tolist() == labels[:1]


def test_labels_of_a_data_set_are_domains_too(tmp_path):
    path = save_rows(tmp_path / "data", datasets.Value("int32"), train=[1, 1, 1])
    job = column_job(path, domain_column="", domains="class")
    assert domain_names(job) == ("0", "1") and domains_of(job) == [0, 1, 0]


# --- what is refused ------------------------------------------------------------------------------


def write_domains(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": "nothing.json"}, r'domains = "nothing.json": .*no such file.* cluster'),
        ({"domains": "", "train_domains": ["noto"]}, r"train_domains = .*no domains"),
        ({"domains": "", "domain_shares": {"noto": 1.0}}, r"domain_shares = .*no domains"),
        ({"train_domains": ["sketch"]}, r'no domain "sketch".* noto, noto_v1, fluent'),
        ({"domain_shares": {"noto": 0.5, "sketch": 0.5}}, r'domain_shares.*no domain "sketch"'),
        ({"domain_shares": {"noto": 0.5, "fluent": 0.4}}, r"add up to 0.9, but must to 1"),
        ({"domain_shares": {"noto": -0.5, "fluent": 1.5}}, r"'noto' must be between 0 and 1"),
        (
            {"train_domains": ["noto"], "domain_shares": {"noto": 0.5, "fluent": 0.5}},
            r"'fluent' is not in multimodal.train_domains = \['noto'\]",
        ),
        ({"domain_column": "origin"}, r'domain_column = "origin": is a column of .*"datasets"'),
        ({"domain_shares": {"noto": 0.999, "fluent": 0.001}}, r"'fluent' is less than one of"),
    ],
)
@pytest.mark.parametrize("is_prompted", [False, True])
def test_keys_that_do_not_fit_are_refused(values, message, is_prompted):
    job = emoji_job(**values)
    build = build_prompt_dataloader if is_prompted else build_image_dataloader
    job.training.global_batch_size = -1
    if is_prompted and values.get("domains"):
        job.multimodal.scene_fraction = 0.0
    with pytest.raises(ValueError, match=message):
        build(1, 0, None, job)


def test_images_of_other_sources_have_no_styles(tmp_path):
    job = make_job(source="folder", path=str(tmp_path), domains="style")
    with pytest.raises(ValueError, match=r'domains = "style": .*"folder" has no styles'):
        domain_names(job)


def test_shares_with_several_shapes_are_refused(tmp_path):
    root = write_captioned(tmp_path / "data", "train", [(16, 16), (24, 10)] * 4)
    write_domain_file(tmp_path / "d.json", "ab", {"train": {str(i): i % 2 for i in range(8)}})
    values = {"aspect_ratios": ["1:1", "2:1"], "domains": str(tmp_path / "d.json")}
    job = captioned_job(root, **values, domain_shares={"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match=r"domain_shares.* cannot be kept .*1:1, 2:1"):
        check_domains(job, is_prompted=True)


def test_prompted_images_have_no_classes_and_scenes_are_in_no_file(tmp_path):
    with pytest.raises(ValueError, match=r'domains = "class": images with prompts have no classes'):
        check_domains(emoji_job(domains="class"), is_prompted=True)
    path = write_domains(tmp_path / "d.json", {"format": 1, "names": ["a"], "splits": {}})
    with pytest.raises(ValueError, match=r"scene_fraction = 0.25: scenes .* set it to 0"):
        check_domains(emoji_job(domains=path), is_prompted=True)
    check_domains(emoji_job(domains=path, scene_fraction=0.0), is_prompted=True)
    check_domains(emoji_job(domains=path), is_prompted=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not a JSON file of domains"),
        ("[1]", r"not a JSON file of domains"),
        ({"names": ["a"], "splits": {}}, r"not a JSON file of domains .*'format'"),
        ({"format": 2, "names": ["a"], "splits": {}}, r"of format 2, not 1"),
        ({"format": 1, "names": [], "splits": {}}, r"must be a list of different names"),
        ({"format": 1, "names": ["a", "a"], "splits": {}}, r"must be a list of different names"),
        ({"format": 1, "names": ["a b"], "splits": {}}, r"'a b' must have letters"),
        ({"format": 1, "names": [1], "splits": {}}, r"name 1 must have letters"),
        ({"format": 1, "names": ["a"], "splits": []}, r"must be an object of objects"),
        ({"format": 1, "names": ["a"], "splits": {"t": {"k": 1}}}, r'"t" has the domain 1 for "k"'),
        ({"format": 1, "names": ["a"], "splits": {"t": {"k": "a"}}}, r"domain 'a' for \"k\""),
        ({"format": 1, "names": ["a", "b"], "splits": {"t": {"k": True}}}, r"the domain True"),
    ],
)
def test_files_that_are_no_domains_are_refused(tmp_path, content, message):
    path = write_domains(tmp_path / "domains.json", content)
    with pytest.raises(ValueError, match=message) as error:
        domain_names(emoji_job(domains=path))
    assert path in str(error.value)


def test_every_image_must_be_in_the_file_and_others_are_counted(tmp_path, caplog):
    job = emoji_job()
    images = open_images(job, TRAIN, "unseen_style")
    keys = [images.relative_key(index) for index in range(146)]
    entries = {key: number % 2 for number, key in enumerate(keys)}
    path = tmp_path / "domains.json"
    write_domain_file(path, ["a", "b"], {"unseen_style": {**entries, "gone (noto)": 0, "x": 1}})
    job.multimodal.domains = str(path)
    with caplog.at_level("INFO"):
        assert domains_of(job, "unseen_style") == [number % 2 for number in range(146)]
    assert '2 entries of split "unseen_style" are of no image' in caplog.text
    assert 'Domains of split "unseen_style": a 73, b 73' in caplog.text
    for key in (keys[3], keys[7]):
        del entries[key]
    write_domain_file(path, ["a", "b"], {"unseen_style": {**entries, "gone (noto)": 0}})
    message = rf"no domain for 2 of 146 images .* \"{re.escape(keys[3])}\""
    with pytest.raises(ValueError, match=message):
        build_image_dataloader(1, 0, None, job)
    with pytest.raises(ValueError, match=r'no domains for split "unseen_concept".* unseen_style'):
        build_image_validation_dataloader(1, 0, job, "unseen_concept")


def test_a_state_depends_on_a_file_by_its_content(tmp_path):
    job = emoji_job()
    images = open_images(job, TRAIN, "unseen_style")
    keys = [images.relative_key(index) for index in range(146)]
    jobs = []
    for name, number in (("one", 0), ("moved", 0), ("other", 1)):
        path = tmp_path / f"{name}.json"
        write_domain_file(path, ["a", "b"], {"unseen_style": dict.fromkeys(keys, number)})
        jobs.append(emoji_job(domains=str(path)))
    one, moved, other = (build_image_dataloader(1, 0, None, job) for job in jobs)
    moved.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"multimodal\.domains is 'a file of sha256"):
        other.load_state_dict(one.state_dict())


def test_domains_without_images_are_refused(tmp_path):
    keys = [f"{i}.png" for i in range(3)]
    for split in ("train", "val"):
        write_folder(tmp_path / "data" / split, 3, classes=("c",))
    keys = ["c/0.png", "c/2.png", "c/more/1.png"]
    splits = {"train": dict.fromkeys(keys, 0), "val": dict.fromkeys(keys, 1)}
    write_domain_file(tmp_path / "domains.json", ["a", "b"], splits)
    values = {"source": "folder", "path": str(tmp_path / "data"), "image_size": 8}
    values |= {"domains": str(tmp_path / "domains.json")}
    build_image_dataloader(1, 0, None, make_job(**values))
    for more in ({"train_domains": ["a", "b"]}, {"domain_shares": {"a": 0.5, "b": 0.5}}):
        (key,) = more
        message = rf'multimodal\.{key} = .*train_split "train" has no images of "b" .*a 3, b 0'
        with pytest.raises(ValueError, match=message):
            build_image_dataloader(1, 0, None, make_job(**values, **more))
    job = make_job(**values, train_domains=["a"])
    build_image_dataloader(1, 0, None, job)
    with pytest.raises(ValueError, match=r'"val" has no images of "a" .*Leave out the split'):
        build_image_validation_dataloader(1, 0, job, "val")
    both = make_job(**values, train_domains=["a", "b"])
    assert len(build_image_validation_dataloader(1, 0, both, "val")) == 1


def test_names_that_would_be_the_same_are_refused():
    assert clean_names(["a & b", "a-b", " c/"], "x") == ("a_b", "a-b", "c")
    with pytest.raises(ValueError, match=r"x cannot name domains: 'a b' .* what 'a/b' is"):
        clean_names(["a/b", "a b"], "x")
    with pytest.raises(ValueError, match=r"'\?' has no letter"):
        clean_names(["?"], "x")


@pytest.mark.parametrize(
    ("feature", "train", "val", "message"),
    [
        (datasets.Value("string"), ["a", None], ["a"], r"has null in 1 rows, .* row 1"),
        (datasets.Value("string"), ["a", "b"], ["a", "c"], r"'c' in row 1, .*domains a, b"),
        (datasets.Value("int64"), [1, 2], [3], r"has 3 in row 0"),
        (datasets.ClassLabel(names=["p"]), [0, 0], [-1], r"-1 in row 0, .* p\."),
        (datasets.Value("float32"), [0.5, 1.0], [1.0], r"holds float32; it must hold"),
        (datasets.List(datasets.Value("string")), [["a"], []], [["a"]], r"it must hold strings"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, feature, train, val, message):
    path = save_rows(tmp_path / "data", feature, train=train, val=val)
    job = column_job(path)
    with pytest.raises(ValueError, match=message):
        domain_names(job)
        images = open_images(job, VALIDATION, "val")
        open_domains(job, VALIDATION, "val", images)


def test_a_column_that_is_not_there_and_two_ways_to_say_domains_are_refused(tmp_path):
    path = save_rows(tmp_path / "data", datasets.Value("string"), train=["a", "b"])
    with pytest.raises(ValueError, match=r'domain_column = "source": .*columns are .*origin'):
        domain_names(column_job(path, domain_column="source"))
    with pytest.raises(ValueError, match=r'so does multimodal.domains = "class"; remove one'):
        domain_names(column_job(path, domains="class"))


@pytest.mark.parametrize("family", ["mot", "mone"])
@pytest.mark.parametrize(
    "words",
    [
        ("--multimodal.domains", "style"),
        ("--multimodal.domain_column", "origin"),
        ("--multimodal.train_domains", "noto"),
        ("--multimodal.domain_shares", "noto=1"),
    ],
)
def test_models_of_tokens_and_classifiers_refuse_domains(family, words):
    with pytest.raises(ValueError, match=rf"{words[0][2:]} = .*has no experts for domains"):
        check_data(debug_job(family, *words))


def test_a_model_of_images_checks_its_domains():
    words = ("--multimodal.domains", "style", "--multimodal.class_of", "style+group")
    check_data(debug_job("mom", *words, "--multimodal.domain_shares", "noto=0.25,fluent=0.75"))
    with pytest.raises(ValueError, match=r'train_domains = .*no domain "sketch"'):
        check_data(debug_job("mom", *words, "--multimodal.train_domains", "sketch"))
    with pytest.raises(ValueError, match=r'domains = "class": images with prompts'):
        check_data(debug_job("mmdit", "--multimodal.domains", "class"))
