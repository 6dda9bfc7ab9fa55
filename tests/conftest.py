"Marks, and what several tests share"

import os
import subprocess
from pathlib import Path

import pytest
from browser import lab, lacking  # `lab` is a fixture

root = Path(__file__).resolve().parent.parent
os.environ['HF_HUB_OFFLINE'] = '1'  # nothing here may need the network, nor find it by accident
os.environ.pop('CLIPCAP_DATA', None)


def pytest_configure(config):
    config.addinivalue_line(
        'markers', 'slow: takes minutes; run by `make test-slow` (pytest -m slow)'
    )
    config.addinivalue_line(
        'markers', 'browser: drives JupyterLab in headless Chromium; skipped where there is none'
    )
    if not config.option.markexpr:
        config.option.markexpr = 'not slow'


def pytest_runtest_setup(item):
    if item.get_closest_marker('browser') and (lack := lacking()):
        pytest.skip(lack)


@pytest.fixture(scope='session')
def repo_files():
    "Paths, relative to the root, of the files that git has or would add"
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True
    ).stdout.split('\0')
    return sorted(Path(n) for n in set(names) if n and (root / n).is_file())


def clipcap(*arguments, code=0):
    "Run the command in this process: what it printed, and its complaints line by line"
    from typer.testing import CliRunner

    from clipcap.cli.main import app

    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name='clipcap')
    assert result.exit_code == code and not isinstance(result.exception, Exception), (
        result.exception,
        result.output,
    )
    return result.stdout, result.stderr.splitlines()


def complaint(*arguments):
    "The one line with which the command refuses"
    said, [line] = clipcap(*arguments, code=1)
    assert not said and line.startswith('clipcap: ') and 'Traceback' not in line
    return line
