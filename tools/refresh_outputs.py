"""Export the notebooks, run them as nbdev_test does, keep their outputs, and clean them.

python tools/refresh_outputs.py [--flags slow] [nbs/01_data.ipynb ...]     (all notebooks where none is named)
What goes to stderr (progress bars, warnings) is not kept; paths and addresses that change from run to run are evened out."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from run_notebooks import notebooks, offline, root


def steady(text):
    "The text without what differs from machine to machine or run to run"
    text = text.replace(str(root), '..')
    text = re.sub(r'/tmp/tmp\w+', '/tmp/...', text)
    return re.sub(r'\b0x[0-9a-f]{6,}\b', '0x...', text)


def keep(outputs):
    "The outputs worth storing, steadied"
    outputs = [o for o in outputs if o.get('name') != 'stderr']
    live = [
        o for o in outputs if o.get('metadata', {}).get('live')
    ]  # drawings that replace one another
    outputs = [o for o in outputs if not any(o is old for old in live[:-1])]
    for o in outputs:
        twice = {
            k: len(v) for k, v in o.get('data', {}).items() if k in ('image/png', 'image/jpeg')
        }  # Pillow gives both
        if len(twice) > 1:
            del o['data'][max(twice, key=twice.get)]
        texts = (
            [(o, 'text')]
            if 'text' in o
            else [(o['data'], k) for k in o['data'] if k.startswith('text/')]
        )
        for where, key in texts:
            v = where[key]
            where[key] = steady(v) if isinstance(v, str) else [steady(line) for line in v]
    return outputs


def refresh(path, flags):
    "Run one notebook in this process and write it back; leave it alone where a cell fails"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    nb, skip = read_nb(path), set(get_config().tst_flags.split()) - set(flags.split())
    directives = {
        c.id: getattr(c, 'directives_', None) or {}
        for c in NBProcessor(path, process=True, rm_directives=False).nb.cells
    }

    def omit(cell):
        d = directives[cell.id]
        if (
            cell.cell_type != 'code'
            or d.get('eval:', [''])[0].lower() == 'false'
            or skip & d.keys()
        ):
            return True
        cell.outputs = []

    shell = CaptureShell(path, mpl_format='png')
    try:
        with working_directory(path.parent):
            shell.run_all(
                nb,
                exc_stop=True,
                preproc=omit,
                postproc=lambda cell: setattr(cell, 'outputs', keep(cell.outputs)),
            )
    except Exception:
        sys.exit(shell.prettytb(fname=path))
    write_nb(nb, path)
    nbdev_clean(fname=str(path))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument(
        '--flags', default='', help='run the cells with these flags too, such as "slow cuda"'
    )
    parser.add_argument(
        '--here', action='store_true', help=argparse.SUPPRESS
    )  # one notebook, in this process
    args = parser.parse_args()
    if args.here:
        refresh(args.notebooks[0].resolve(), args.flags)
    else:
        subprocess.run([Path(sys.executable).parent / 'nbdev_export'], cwd=root, check=True)
        for path in args.notebooks or notebooks():
            print(path, flush=True)
            command = [sys.executable, __file__, '--here', '--flags', args.flags, path.resolve()]
            if subprocess.run(command, cwd=root, env=offline()).returncode:
                sys.exit(1)
