"""Messages of one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from util.runtime.errors import exit_with_error, printable


@given(st.text(st.characters(codec=None)))
def test_printable_text_moves_no_cursor(text):
    shown = printable(text)
    shown.encode()  # also of names that no encoding knows
    assert not any(character < " " or "\x7f" <= character < "\xa0" or character == "\u202e" for character in shown)
    assert printable(shown) == shown


def test_names_of_any_script_stay_as_they_are():
    names = "é 中文 عربي हिन्दी 👩\u200d🔬"
    assert printable(names) == names
    assert printable("a\x1b[31m\n\udcff") == "a\\x1b[31m\\n\\udcff"


def test_an_error_with_an_escape_sequence_is_shown_escaped(capsys):
    with pytest.raises(SystemExit):
        exit_with_error("main.py", "--resume \x1b]0;title\x07.pth: there\nis none", 2)
    assert capsys.readouterr().err == "main.py: error: --resume \\x1b]0;title\\x07.pth: there is none\n"
