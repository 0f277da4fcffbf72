"""The installed libraries against requirements.txt."""

import pytest

from support import requirements
from support.cli import BadInput


def test_the_file_and_what_is_installed_here_agree():
    requirements.check_requirements()


def test_what_is_missing_or_of_another_version_is_named(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("transformers>=99\npytest\n\nno-such-library>=1,<2\n")
    match = r"needs transformers>=99, here \d.*; no-such-library>=1,<2, here missing: pip install -r"
    with pytest.raises(BadInput, match=match):
        requirements.check_requirements(path)
