"Marks, and what several tests share"

import os
import subprocess
from pathlib import Path

import pytest
from browser import lab, lacking  # noqa: F401 - `lab` is a fixture

root = Path(__file__).resolve().parent.parent
os.environ['HF_HUB_OFFLINE'] = '1'  # nothing here may need the network, nor find it by accident
os.environ.pop('CLIPCAP_DATA', None)
MARKERS = {
    'slow': 'takes minutes; run by `make test-slow` (pytest -m slow)',
    'browser': 'drives JupyterLab in headless Chromium; skipped where there is none',
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line('markers', f'{name}: {meaning}')
    if not config.option.markexpr:
        config.option.markexpr = 'not slow'


def pytest_runtest_setup(item):
    if item.get_closest_marker('browser') and (lack := lacking()):
        pytest.skip(lack)


@pytest.fixture(scope='session')
def repo_files():
    "Paths, relative to the root, of the files that git has or would add"
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    names = set(listed.split('\0')) - {''}
    return sorted(Path(name) for name in names if (root / name).is_file())


def clipcap(*arguments, code=0):
    "Run the command in this process: what it printed, and its complaints line by line"
    from typer.testing import CliRunner

    from clipcap.cli.main import app

    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name='clipcap')
    crashed = isinstance(result.exception, Exception)  # SystemExit is none
    assert result.exit_code == code and not crashed, (result.exception, result.output)
    return result.stdout, result.stderr.splitlines()


def complaint(*arguments):
    "The one line with which the command refuses"
    printed, [line] = clipcap(*arguments, code=1)
    assert not printed
    assert line.startswith('clipcap: ')
    assert 'Traceback' not in line
    return line


def refusal(function, *arguments, **options):
    "The one line with which a function refuses"
    from clipcap.base.files import ClipcapError

    with pytest.raises(ClipcapError) as caught:
        function(*arguments, **options)
    line = str(caught.value)
    assert '\n' not in line
    assert len(line) < 700
    return line
