"""`scripts/sample.py`: what it writes, and one line for what is wrong."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

import torchtitan_mixtures  # noqa: F401
from tests.jobs import ROOT, debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.data.audio import read_wav
from torchtitan_mixtures.data.speech import build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer, build_text_tokenizer
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer
from torchtitan_mixtures.sampling import command_line
from torchtitan_mixtures.sampling import results as results_module
from torchtitan_mixtures.sampling.command import main
from torchtitan_mixtures.sampling.command_line import ProgressBar


def tiny_model(**fields):
    """Random weights, and the vocabularies of the embedded tokenizers."""
    args = MoTModelArgs(
        dim=32, n_layers=1, n_heads=2, vocab_size=2048, max_seq_len=256, init_seed=0, **fields
    )
    model = MoTTransformer(args)
    model.init_weights()
    return model


def save(folder, model, *overrides):
    step = folder / "checkpoint" / "step-7"
    checkpoint_config.write(step, debug_job("mot", *overrides), model.model_args)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), tiny_model(code_vocab_sizes=[1024]))


@pytest.fixture(scope="module")
def speaking_checkpoint(tmp_path_factory):
    names = ["text", "image", "speech"]
    model = tiny_model(n_modalities=3, modality_names=names, code_vocab_sizes=[1024, 512])
    flavor = "--model.flavor=debugmodel_3modality"
    return save(tmp_path_factory.mktemp("speaking"), model, flavor)


def sample(checkpoint, out, *options):
    main(["--checkpoint", str(checkpoint), "--out", str(out), *options])
    return json.loads((out / "samples.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def test_text_becomes_images_of_the_codes_in_the_table(checkpoint, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("two dogs\n\n  a house \n")
    out = tmp_path / "out"
    table = sample(
        checkpoint, out, "--prompt", "a red fox", "--prompt-file", str(tmp_path / "more.txt"),
        "--num-samples=2", "--guidance=2", "--seed=3", "--batch-size=4",
    )  # fmt: skip
    assert (table["step"], table["settings"]["seed"], table["settings"]["guidance"]) == (7, 3, 2)
    prompts = [entry["prompt"] for entry in table["samples"]]
    assert prompts == ["a red fox"] * 2 + ["two dogs"] * 2 + ["a house"] * 2
    assert [entry["number"] for entry in table["samples"]] == list(range(6))
    tokenizer = build_image_tokenizer("emoji_32px")
    files = set()
    for entry in table["samples"]:
        (segment,) = entry["segments"]
        assert len(segment["codes"]) == 64
        expected = tokenizer.decode(np.array(segment["codes"])[None])[0]
        assert np.array_equal(pixels(out / segment["file"]), expected)
        files.add(segment["file"])
    assert {path.name for path in out.iterdir()} == files | {"contact_sheet.png", "samples.json"}
    sheet = pixels(out / "contact_sheet.png")
    first = pixels(out / table["samples"][0]["segments"][0]["file"])
    large = first.repeat(3, 0).repeat(3, 1)
    assert any(
        np.array_equal(sheet[4 : 4 + 96, left : left + 96], large)
        for left in range(sheet.shape[1] - 95)
    )
    assert (sheet[:100, :180] < 128).any(), "no label"
    assert "6 samples" in capsys.readouterr().out


def test_images_become_text_and_further_images(checkpoint, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), "orange").save(picture)
    table = sample(
        checkpoint, tmp_path / "a", "--image", str(picture), str(picture), "--image",
        str(picture), "--max-text-tokens=5",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert len(table["samples"]) == 3
    for entry in table["samples"]:
        (segment,) = entry["segments"]
        assert (entry["prompt"], segment["modality"]) == ("picture.png", "text")
        assert f"'picture.png' -> {segment['text']!r}" in printed
    assert not (tmp_path / "a" / "contact_sheet.png").exists()
    table = sample(
        checkpoint, tmp_path / "b", "--image", str(picture), "--prompt", "fox", "--into", "text",
        "image", "--max-text-tokens=3",
    )  # fmt: skip
    for entry in table["samples"]:
        assert [segment["modality"] for segment in entry["segments"]] == ["text", "image"]


def test_text_becomes_speech_and_speech_becomes_anything(speaking_checkpoint, tmp_path):
    limit = "--max-speech-seconds=0.4"
    table = sample(
        speaking_checkpoint, tmp_path / "a", "--prompt", "fox", "--into", "speech", limit
    )
    ((segment,),) = (entry["segments"] for entry in table["samples"])
    assert 1 <= len(segment["codes"]) <= 10  # 25 a second
    sound = tmp_path / "a" / segment["file"]
    tokenizer = build_speech_tokenizer("emoji_25hz")
    waveform = tokenizer.decode(np.array(segment["codes"]))
    found = read_wav(sound, tokenizer.sample_rate)
    assert found.shape == waveform.shape
    np.testing.assert_allclose(found, waveform.clip(-1, 1), atol=1e-4)
    table = sample(
        speaking_checkpoint, tmp_path / "b", "--speech", str(sound), "--into", "text", "image",
        "speech", limit, "--max-text-tokens=4",
    )  # fmt: skip
    (entry,) = table["samples"]
    assert [part["modality"] for part in entry["segments"]] == ["text", "image", "speech"]
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    with pytest.raises(SystemExit):
        sample(speaking_checkpoint, tmp_path / "c", "--speech", str(tmp_path / "noise.wav"))


def test_the_same_seed_gives_the_same_files(checkpoint, tmp_path):
    arguments = ("--prompt", "a red fox", "--top-k=50", "--top-p=0.9", "--temperature=0.8")
    first, again, other = (
        sample(checkpoint, tmp_path / name, *arguments, f"--seed={seed}")["samples"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_without_a_folder_the_next_number_is_taken(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("001", "002"):
        main(["--checkpoint", str(checkpoint), "--prompt", "x", "--into", "text"])
        assert (tmp_path / "outputs" / "samples" / name / "samples.json").is_file()
    assert len(list((tmp_path / "outputs" / "samples").iterdir())) == 2


BROKEN = [
    ((), "nothing to continue: pass --prompt"),
    (("--prompt-file={tmp}/none.txt",), "--prompt-file {tmp}/none.txt: cannot be read"),
    (("--image={tmp}/none.png",), "--image {tmp}/none.png: cannot be read (No such file"),
    (
        ("--image={tmp}/bad.png",),
        "--image {tmp}/bad.png: cannot be read as an image (not an image in a known format",
    ),
    (
        ("--image={tmp}/empty.png",),
        "--image {tmp}/empty.png: cannot be read as an image (the file is empty).",
    ),
    (("--prompt=",), "--prompt '': is blank (a shell variable that is not set?)"),
    (("--prompt=x", "--prompt= \t"), "--prompt ' \\t': is blank"),
    (("--prompt=a \udcff",), "--prompt 'a \\udcff': is not UTF-8"),
    (("--prompt=x", "--guidance=1e40"), "guidance = 1e+40: must be from 0 to 1000"),
    (("--prompt=x", "--into=speech"), "into = speech: the model has no such modality"),
    (("--speech={tmp}/bad.png",), "--speech {tmp}/bad.png: the model has no speech"),
    (("--prompt", "fox " * 300), "fox [...]': the prompt has"),
    (("--prompt=x", "--into=text", "--max-text-tokens=999"), "999"),
    (("--prompt=x", "--top-p=0"), "top_p = 0.0: must be above 0"),
    (("--prompt=x", "--num-samples=0"), "--num-samples 0: must be at least 1"),
    (("--prompt=x", "--num-samples=10001"), "--num-samples 10001: must be at most 10,000"),
    (("--prompt=x", "--num-samples=99999999999999999999"), "must be at most 10,000"),
    (("--prompt=x", "--batch-size=-1"), "--batch-size -1: must be at least 1"),
    (("--prompt=x", "--out={tmp}"), "--out {tmp}: exists and is not an empty folder"),
    (("--prompt=x", "--out={tmp}/bad.png/a/b"), "--out {tmp}/bad.png/a/b: cannot be written to ("),
    (("--prompt=x", "--out=/proc/none"), "--out /proc/none: cannot be written to ("),
    (("--prompt=x", "--out={tmp}/a/" + 300 * "b"), "cannot be written to (File name too long)"),
    (("--prompt=x", "--checkpoint={tmp}/none"), "{tmp}/none: no such folder"),
    (("--prompt=x", "--checkpoint={tmp}/foreign"), "config.json is missing"),
]


@pytest.mark.parametrize(("options", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_what_is_wrong_is_said_in_one_line(checkpoint, tmp_path, capsys, options, message):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / ".metadata").write_bytes(b"")
    options = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as stop:
        main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *options])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message.format(tmp=tmp_path) in printed.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "a").exists()


def test_a_bad_folder_is_noticed_before_anything_is_generated(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan_mixtures.sampling.command.load_checkpoint", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([f"--checkpoint={checkpoint}", "--prompt=x", f"--out={tmp_path}/file/out"])


def test_an_error_leaves_no_folder_that_was_not_there(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan_mixtures.sampling.command.generate", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for out in ([], ["--out=a/b/c"], ["--out=there"]):
        with pytest.raises(TypeError):
            main([f"--checkpoint={checkpoint}", "--prompt=x", *out])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_two_commands_do_not_take_the_same_number(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with command_line.choose_folder(None) as first, command_line.choose_folder(None) as second:
        assert (first.name, second.name) == ("001", "002")


def test_finished_batches_are_kept_when_a_later_one_fails(checkpoint, tmp_path, monkeypatch):
    out, write = tmp_path / "out", results_module._write_segment

    def fail_in_the_second_batch(folder, name, *rest):
        if name == "prompt001_sample000_0":
            raise KeyboardInterrupt
        return write(folder, name, *rest)

    monkeypatch.setattr(results_module, "_write_segment", fail_in_the_second_batch)
    arguments = ["--prompt=a fox", "--prompt=a dog", "--num-samples=2", "--batch-size=2"]
    with pytest.raises(KeyboardInterrupt):
        main([f"--checkpoint={checkpoint}", f"--out={out}", *arguments])
    table = json.loads((out / "samples.json").read_text())["samples"]
    assert [(entry["prompt"], entry["number"]) for entry in table] == [("a fox", 0), ("a fox", 1)]
    files = {entry["segments"][0]["file"] for entry in table}
    assert {path.name for path in out.iterdir()} == files | {"samples.json"}


def test_a_full_disk_is_one_message(checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(SystemExit):
        main([f"--checkpoint={checkpoint}", f"--out={tmp_path}/out", "--prompt=x"])
    message = capsys.readouterr().err
    assert message == (
        f"error: --out {tmp_path}/out: cannot be written to (No space left on device).\n"
    )


def test_a_checkpoint_that_diverged_is_said_in_one_line(tmp_path, capsys):
    model = tiny_model(code_vocab_sizes=[1024])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    save(tmp_path / "run", model)
    for into in ("text", "image"):
        with pytest.raises(SystemExit) as stop:
            main([f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--prompt=x",
                  f"--into={into}"])  # fmt: skip
        assert stop.value.code == 2
        message = "error: the model's logits are not finite (did the run diverge?).\n"
        assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_names_of_files_that_are_no_text_are_no_hindrance(checkpoint, tmp_path, monkeypatch):
    picture = tmp_path / "pict\udcffure.png"
    Image.new("RGB", (50, 40), "orange").save(picture)
    # As a terminal would have it that knows less letters than captions have.
    plain = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    table = sample(checkpoint, tmp_path / "o\u00fct", f"--image={picture}", "--max-text-tokens=3")
    assert table["samples"][0]["prompt"] == "pict?ure.png"
    plain.seek(0)
    assert "o\\xfct" in plain.read()


def test_errors_that_are_not_the_users_keep_their_traceback(checkpoint, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setattr("torchtitan_mixtures.sampling.command.load_checkpoint", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["--checkpoint", str(checkpoint), "--prompt", "x"])


def test_the_script_is_this_command(checkpoint, tmp_path):
    command = [sys.executable, "scripts/sample.py", "--checkpoint", str(checkpoint), "--image"]
    result = subprocess.run(
        [*command, str(tmp_path / "none.png")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "none.png: cannot be read" in result.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_terminals_only():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        bar = ProgressBar("into image", stream)
        for done in range(1, 5):
            bar(done, 4)
    assert file.getvalue() == ""
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count("\r") == 4
    assert "4/4 steps" in terminal.getvalue().split("\r")[-1]
    assert "#" * ProgressBar.WIDTH in terminal.getvalue()


def test_sampling_reads_the_weights_of_the_checkpoint(checkpoint, tmp_path):
    """Greedy codes are those that the saved model finds likeliest, one after the other."""
    table = sample(checkpoint, tmp_path / "out", "--prompt", "a red fox", "--temperature=0")
    codes = table["samples"][0]["segments"][0]["codes"]
    model = tiny_model(code_vocab_sizes=[1024])
    tokenizer = build_text_tokenizer("emoji")
    sentinels = tokenizer.sentinels
    tokens = [sentinels.bos, *tokenizer.encode("a red fox"), sentinels.image_start]
    with torch.no_grad():
        logits = model(torch.tensor([tokens + [2048 + code for code in codes]]))[0]
    found = logits[len(tokens) - 1 : -1, 2048:].argmax(-1).tolist()
    assert found == codes


def test_no_prompt_is_answered_before_all_are_checked(checkpoint, tmp_path, capsys):
    long = tmp_path / "long.txt"
    long.write_text("\ufeffa fox\n" + "word " * 400 + "\n", encoding="utf-8")
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main([f"--checkpoint={checkpoint}", f"--prompt-file={long}", f"--out={out}"])
    message = capsys.readouterr().err
    assert "word word" in message and "positions" in message
    assert not out.exists()
