"""The list of planted bugs has not gone stale: each can still be planted."""

import pytest

from bug_list import BUGS
from planted_bugs import ROOT


@pytest.mark.parametrize("bug", BUGS, ids=[bug.what for bug in BUGS])
def test_the_line_stands_once_in_its_file(bug):
    text = (ROOT / "minicnn" / bug.file).read_text()
    assert text.count(bug.old) == 1
    assert bug.new != bug.old
