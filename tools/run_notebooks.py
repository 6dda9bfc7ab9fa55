"""Run every notebook as a test, and prove that each one ran.

nbdev_test by itself also passes when it tests nothing: where no notebook matches, where a name
begins with an underscore, where a folder holds `.notest`, where the front matter says skip_exec.

python tools/run_notebooks.py [--flags "slow cuda"]"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copy, copytree

root = Path(__file__).resolve().parent.parent
nbs = root / 'nbs'
scripts = Path(sys.executable).parent  # where nbdev's commands are installed
workers = 2
DIRECTIVES = set(
    'default_exp export exports exporti hide eval: echo: output: slow cuda data'.split()
)
SHELL = r'(?m)^\s*(!|%%?(bash|sh|script|system|sx)\b)'


def notebooks():
    "Every notebook on disk, wherever under nbs/ and whatever its name"
    return sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def offline():
    "The environment of a notebook: no network, and the drawn data set, never a photo of anyone's"
    return os.environ | {'HF_HUB_OFFLINE': '1', 'CLIPCAP_DATA': str(root / 'data' / 'sample')}


def unclean():
    "The notebooks that nbdev_clean would change"
    with tempfile.TemporaryDirectory() as tmp:
        copy(root / 'settings.ini', tmp)
        copytree(nbs, Path(tmp) / 'nbs')
        subprocess.run([scripts / 'nbdev_clean'], cwd=tmp, check=True)
        cleaned = {p: (Path(tmp) / p.relative_to(root)).read_bytes() for p in notebooks()}
    return [p for p, content in cleaned.items() if p.read_bytes() != content]


def source(notebook, *kinds):
    "The text of all cells of these kinds"
    cells = (c for c in notebook['cells'] if c['cell_type'] in kinds)
    return '\n'.join(''.join(c['source']) for c in cells)


def traps(path):
    "What would make nbdev_test pass a notebook, or a part of it, without running it"
    notebook = json.loads(path.read_text(encoding='utf-8'))
    code = source(notebook, 'code')
    if path.name[0] in '_.':
        yield 'its name begins with _ or .'
    if notebook['metadata'].get('kernelspec', {}).get('language', 'python') != 'python':
        yield 'its kernel is not Python'
    if 'skip_exec' in source(notebook, 'raw', 'markdown'):
        yield 'skip_exec'
    if re.search(SHELL, code):
        yield 'a shell command, whose failure nobody notices'
    for word in set(re.findall(r'(?m)^#\s*\|\s*(\S+)', code)) - DIRECTIVES:
        yield f'unknown directive "#| {word}"'


def faults():
    "What is wrong before anything has run, a line each"
    if not notebooks():
        yield 'there is no notebook in nbs/'
    for path in unclean():
        name = path.relative_to(root)
        yield f'{name} is not clean: run `make notebooks NB={name}`, or nbdev_clean'
    for path in notebooks():
        for trap in traps(path):
            yield f'{path.relative_to(root)}: {trap}'
    for path in nbs.rglob('.notest'):
        yield f'{path.relative_to(root)} hides notebooks from nbdev_test'


def environment(flags):
    "The environment of nbdev_test: the cells with the flag `data` alone see data of one's own"
    threads = max(1, (os.cpu_count() or 1) // workers)
    env = {'OMP_NUM_THREADS': str(threads)} | offline() | {'PYTHONUNBUFFERED': '1'}
    if 'data' in flags.split():
        del env['CLIPCAP_DATA']
        if 'CLIPCAP_DATA' in os.environ:
            env['CLIPCAP_DATA'] = os.environ['CLIPCAP_DATA']
    return env


def test(flags):
    "Run nbdev_test; what it printed, and its exit code"
    command = [scripts / 'nbdev_test', '--do_print', '--timing', '--flags', flags]
    command += ['--n_workers', str(workers)]
    run = subprocess.Popen(
        command,
        cwd=root,
        env=environment(flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding='utf-8',
        errors='replace',
    )
    printed = []
    for line in run.stdout:
        print(line, end='', flush=True)
        printed.append(line)
    return ''.join(printed), run.wait()


def main(flags):
    found = list(faults())
    if found:
        sys.exit('\n'.join(found))
    printed, code = test(flags)
    missing = [p for p in notebooks() if printed.count(f'- Completed {p}') != 1]
    names = ', '.join(p.relative_to(nbs).as_posix() for p in missing)
    if missing:
        sys.exit(f'nbdev_test failed (exit code {code}); these did not run to their end: {names}')
    if code or 'Success.' not in printed:
        sys.exit(f'nbdev_test failed (exit code {code})')
    print(f'{len(notebooks())} notebooks are clean, and each one ran.')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flags', default='', help='also run cells with these flags: "slow cuda"')
    main(parser.parse_args().flags)
