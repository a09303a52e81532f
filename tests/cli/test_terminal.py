"""Text that others wrote (keys, paths, prompts, answers) is shown as it is: no terminal and no markup obeys it."""

import io
import sys

import pytest
from helpers.tiny import recipe_text, write_recipe

from remix_cli import cli
from remix_cli.streams import Output, visible
from remix_cli.terminal import Console

HOSTILE = "a\x1b[2J\x07\x9b1A\u202e"
SHOWN = r"a\x1b[2J\x07\x9b1A\u202e"


def test_control_characters_are_spelt_out_and_lines_and_letters_stay():
    assert visible(HOSTILE) == SHOWN
    assert visible("\0\x08\x0b\x0c\x7f\udc9b x\ry") == r"\x00\x08\x0b\x0c\x7f\udc9b x\ry"
    assert visible("a\tb\r\nc\n é 你 שלום 👩‍👩‍👧") == "a\tb\r\nc\n é 你 שלום 👩‍👩‍👧"


def refused(verb, *arguments, expect=2):
    out, err = verb(*arguments, expect=expect)
    assert visible(out + err) == out + err
    assert SHOWN in err, err


def test_errors_do_not_pass_on_escape_sequences(verb, stage, tmp_path):
    refused(verb, "train", f"{tmp_path}/{HOSTILE}.yaml")
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "out"))
    refused(verb, "validate", recipe, f"train.{HOSTILE}=1")
    refused(verb, "validate", recipe, f"data.train.path={HOSTILE}")
    refused(verb, "generate", tmp_path / HOSTILE, expect=5)


def test_a_command_that_is_none_is_not_obeyed_either(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["remix", HOSTILE])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"'{SHOWN}'" in capsys.readouterr().err


def test_a_run_in_a_folder_with_any_name_is_trained_scored_and_named_in_full(verb, stage, tmp_path):
    folder = tmp_path / f"[n1][bold]:fire:{HOSTILE}[" / "x]"
    shown = f"{tmp_path}/[n1][bold]:fire:{SHOWN}[/x]"
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], folder))
    said = [
        verb("train", recipe, "train.max_steps=1")[0],
        verb("eval", folder, "--limit", "2")[0],
        verb("route-stats", folder, "--limit", "2")[0],
        verb("compare", folder, folder)[0],
    ]
    for text in said:
        assert visible(text) == text
    for text in said[:2]:
        assert shown in text


def test_prompts_are_shown_and_not_obeyed(verb, finished):
    out, _ = verb("generate", finished, HOSTILE, "b", "--max-new-tokens", "2")
    assert visible(out) == out
    assert f"> {SHOWN}\n" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf_8_gets_every_report(encoding, stage, finished, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_text(*stage[:2], tmp_path / "ö你"))
    for arguments in (
        ["validate", recipe],
        ["route-stats", finished, "--limit", "2"],
        ["generate", finished, "你", "ö", "--max-new-tokens", "1"],
    ):
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding=encoding, write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["remix", *map(str, arguments)])
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert ended.value.code == 0, capsys.readouterr().err
        assert arguments[0] != "generate" or r"> \u4f60" in written.getvalue().decode(encoding)


def test_colours_and_bars_of_our_own_still_work():
    stream = io.StringIO()
    Console(file=Output(stream, None), force_terminal=True, color_system="standard").print(
        HOSTILE, style="bold", highlight=False
    )
    assert stream.getvalue() == f"\x1b[1m{SHOWN}\x1b[0m\n"
    stream = io.StringIO()
    bars = Output(stream, "", bars=True)
    for piece in ("\r 50%|## |", "\x1b[A", "\n", "warning: \r\x1b[A\n"):
        bars.write(piece)
    assert stream.getvalue() == "\r 50%|## |\x1b[A\nwarning: " + r"\r\x1b[A" + "\n"
