"""Are the libraries of requirements.txt installed, in the versions that it names?

python -m support.requirements
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from support.cli import BadInput, NoKnobs, parse, run_main

FILE = Path(__file__).parents[1] / "requirements.txt"


def check_requirements(path: Path = FILE) -> None:
    """Raises BadInput, naming every library that is missing or of another version."""
    wrong = []
    for line in filter(None, path.read_text(encoding="utf-8").splitlines()):
        wanted = Requirement(line)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = ""
        if not found or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{line}, here {found or 'missing'}")
    if wrong:
        raise BadInput(f"this project needs {'; '.join(wrong)}: pip install -r requirements.txt")


def main() -> None:
    parse(NoKnobs, __doc__)
    check_requirements()


if __name__ == "__main__":
    run_main(main)
