"""Export the notebooks, run them as nbdev_test does, keep their outputs, and clean them.

python tools/refresh_outputs.py [--flags slow] [nbs/01_data.ipynb ...]   (all where none is named)

What goes to stderr (progress bars, warnings) is not kept; paths and addresses that change from run
to run are evened out."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from run_notebooks import notebooks, offline, root, scripts


def steady(text):
    "The text without what differs from machine to machine or run to run"
    if isinstance(text, list):
        return [steady(line) for line in text]
    text = text.replace(str(root), '..')
    text = re.sub(r'/tmp/tmp\w+', '/tmp/...', text)
    return re.sub(r'\b0x[0-9a-f]{6,}\b', '0x...', text)


def keep_smaller_picture(data):
    "Pillow shows a picture as PNG and as JPEG: leave the smaller of the two"
    sizes = {kind: len(data[kind]) for kind in ('image/png', 'image/jpeg') if kind in data}
    if len(sizes) > 1:
        del data[max(sizes, key=sizes.get)]


def keep(outputs):
    "The outputs worth storing, steadied"
    outputs = [o for o in outputs if o.get('name') != 'stderr']
    live = [o for o in outputs if o.get('metadata', {}).get('live')]  # each replaces the one before
    outputs = [o for o in outputs if not any(o is earlier for earlier in live[:-1])]
    for output in outputs:
        data = output.get('data', {})
        keep_smaller_picture(data)
        if 'text' in output:
            output['text'] = steady(output['text'])
        for kind in data:
            if kind.startswith('text/'):
                data[kind] = steady(data[kind])
    return outputs


def directives_of(path):
    "Cell id -> its nbdev directives"
    from nbdev.process import NBProcessor

    cells = NBProcessor(path, process=True, rm_directives=False).nb.cells
    return {cell.id: getattr(cell, 'directives_', None) or {} for cell in cells}


def refresh(path, flags):
    "Run one notebook in this process and write it back; leave it alone where a cell fails"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config

    notebook, directives = read_nb(path), directives_of(path)
    skipped = set(get_config().tst_flags.split()) - set(flags.split())

    def omit(cell):
        "Whether a cell is not to run; one that is to run loses its old outputs"
        words = directives[cell.id]
        never = words.get('eval:', [''])[0].lower() == 'false'
        if cell.cell_type != 'code' or never or skipped & words.keys():
            return True
        cell.outputs = []
        return False

    def store(cell):
        cell.outputs = keep(cell.outputs)

    shell = CaptureShell(path, mpl_format='png')
    try:
        with working_directory(path.parent):
            shell.run_all(notebook, exc_stop=True, preproc=omit, postproc=store)
    except Exception:
        sys.exit(shell.prettytb(fname=path))
    write_nb(notebook, path)
    nbdev_clean(fname=str(path))


def main(paths, flags):
    "Refresh each notebook in a process of its own"
    subprocess.run([scripts / 'nbdev_export'], cwd=root, check=True)
    for path in paths or notebooks():
        print(path, flush=True)
        command = [sys.executable, __file__, '--here', '--flags', flags, path.resolve()]
        if subprocess.run(command, cwd=root, env=offline()).returncode:
            sys.exit(1)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--flags', default='', help='also run cells with these flags: "slow cuda"')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        refresh(args.notebooks[0].resolve(), args.flags)
    else:
        main(args.notebooks, args.flags)
