"`from clipcap import ...`: everything is there, and nothing is imported before it is needed"

import subprocess
import sys

import pytest
from conftest import root

import clipcap


def run(code):
    "What a fresh process prints"
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root
    )
    return done.stdout.strip()


def test_every_name_opens():
    for name in clipcap.__all__:
        assert getattr(clipcap, name).__name__ == name
    assert {'Captioner', 'GenerationOptions', 'VisionTower', 'CaptionModel'} <= {*clipcap.__all__}
    assert {'train_recipe', 'evaluate_captions', '__version__'} <= {*dir(clipcap)}
    with pytest.raises(AttributeError, match="'clipcap' has no attribute 'nothing'"):
        clipcap.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from clipcap import nothing  # noqa: F401


@pytest.mark.parametrize('heavy', ['torch', 'transformers', 'numpy', 'pandas', 'PIL'])
def test_importing_costs_nothing(heavy):
    assert (
        run(f'import sys, clipcap; print({heavy!r} in sys.modules, dir(clipcap)[0])')[:5] == 'False'
    )


def test_the_names_are_those_of_the_modules():
    code = (
        'from clipcap import Captioner; import clipcap.image; '
        'print(Captioner is clipcap.image.Captioner)'
    )
    assert run(code) == 'True'


def test_help_imports_no_torch():
    code = (
        'import sys; sys.argv = ["clipcap", "-h"]\n'
        'from clipcap.cli.main import main\n'
        'try: main()\n'
        'except SystemExit: pass\n'
        'print("torch" in sys.modules)'
    )
    assert run(code).endswith('False')
