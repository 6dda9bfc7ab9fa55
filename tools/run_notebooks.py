"""Run every notebook as a test, and prove that each one ran: nbdev_test alone passes when it tests nothing.

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
tools, nbs, workers = Path(sys.executable).parent, root / 'nbs', 2
directives = {
    'default_exp',
    'export',
    'exports',
    'exporti',
    'hide',
    'eval:',
    'echo:',
    'output:',
    'slow',
    'cuda',
    'data',
}


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
        subprocess.run([tools / 'nbdev_clean'], cwd=tmp, check=True)
        return [
            p
            for p in notebooks()
            if p.read_bytes() != (Path(tmp) / p.relative_to(root)).read_bytes()
        ]


def traps(path):
    "What would make nbdev_test pass a notebook, or a part of it, without running it"
    nb = json.loads(path.read_text(encoding='utf-8'))
    source = {
        kind: '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == kind)
        for kind in ('code', 'raw', 'markdown')
    }
    if path.name[0] in '_.':
        yield 'its name begins with _ or .'
    if nb['metadata'].get('kernelspec', {}).get('language', 'python') != 'python':
        yield 'its kernel is not Python'
    if 'skip_exec' in source['raw'] + source['markdown']:
        yield 'skip_exec'
    if re.search(r'(?m)^\s*(!|%%?(bash|sh|script|system|sx)\b)', source['code']):
        yield 'a shell command, whose failure nobody notices'
    for word in set(re.findall(r'(?m)^#\s*\|\s*(\S+)', source['code'])) - directives:
        yield f'unknown directive "#| {word}"'


def test(flags):
    "Run nbdev_test; return what it printed and its exit code"
    env = offline() | {
        'PYTHONUNBUFFERED': '1',
        'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // workers)),
    }
    if 'data' in flags.split():
        env.pop('CLIPCAP_DATA')
    if 'data' in flags.split() and 'CLIPCAP_DATA' in os.environ:
        env['CLIPCAP_DATA'] = os.environ['CLIPCAP_DATA']
    command = [
        tools / 'nbdev_test',
        '--n_workers',
        str(workers),
        '--do_print',
        '--timing',
        '--flags',
        flags,
    ]
    run, said = (
        subprocess.Popen(
            command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ),
        [],
    )
    for line in run.stdout:
        print(line, end='', flush=True)
        said.append(line)
    return ''.join(said), run.wait()


def main(flags):
    faults = [
        f'{p.relative_to(root)} is not clean: run `make notebooks NB={p.relative_to(root)}`, or nbdev_clean'
        for p in unclean()
    ]
    faults += [f'{p.relative_to(root)}: {trap}' for p in notebooks() for trap in traps(p)]
    faults += [
        f'{p.relative_to(root)} hides notebooks from nbdev_test' for p in nbs.rglob('.notest')
    ]
    if not notebooks():
        faults.append('there is no notebook in nbs/')
    if faults:
        sys.exit('\n'.join(faults))
    said, code = test(flags)
    missing = [p.name for p in notebooks() if said.count(f'- Completed {p}') != 1]
    if code or 'Success.' not in said or missing:
        sys.exit(
            f'nbdev_test failed (exit code {code})'
            + (f'; never ran: {", ".join(missing)}' if missing else '')
        )
    print(f'{len(notebooks())} notebooks are clean, and each one ran.')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--flags', default='', help='run the cells with these flags too, such as "slow cuda"'
    )
    main(parser.parse_args().flags)
