"""Try a notebook with other seeds and other numbers of threads: does a check hang on luck?

python tools/try_seeds.py nbs/05_generate.ipynb ... [--seeds 5] [--threads 1 2]

Every seed that a notebook gives to torch is shifted, and each notebook is run once for each seed
and number of threads. A cell that fails is named, with its error; the others are run all the same.
A check that fails for one of them says too much: let it ask for less, or for what must be true."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from run_notebooks import offline, root


def shift_seeds(by):
    "From now on, torch starts its generators from seeds that are moved by so much"
    import torch

    manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: manual_seed(int(seed) + by)


def failures(path, shift, threads):
    "(cell id, error) for each cell that fails"
    import torch
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory

    torch.set_num_threads(threads)
    shift_seeds(shift)
    notebook = read_nb(path)

    def omit(cell):
        directives = [line for line in cell.source.splitlines() if line.startswith('#|')]
        flagged = any(
            word in ' '.join(directives) for word in ('slow', 'cuda', 'data', 'eval: false')
        )
        exports = 'nbdev_export(' in cell.source
        return cell.cell_type != 'code' or flagged or exports

    with working_directory(path.parent):
        CaptureShell(path, mpl_format='png').run_all(notebook, preproc=omit)
    for cell in notebook.cells:
        for output in cell.get('outputs', []):
            if output['output_type'] == 'error':
                yield cell.id, f'{output["ename"]}: {output["evalue"]}'


def main(paths, seeds, threads):
    "Each run in a process of its own; exit code 1 where any cell failed"
    failed = False
    for path in paths:
        for shift in range(seeds):
            for count in threads:
                env = offline() | {'OMP_NUM_THREADS': str(count), 'PYTHONPATH': str(root)}
                command = [sys.executable, __file__, '--here', str(shift * 1000), str(count), path]
                run = subprocess.run(command, env=env, capture_output=True, text=True)
                found = [line for line in run.stdout.splitlines() if line.startswith('FAILED ')]
                failed |= bool(run.returncode or found)
                print(f'{path}, seeds + {shift * 1000}, {count} threads:', end=' ')
                print('; '.join(found) or ('died' if run.returncode else 'ok'), flush=True)
    sys.exit(failed)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--here']:
        where = Path(sys.argv[4]).resolve()
        os.environ['IN_TEST'] = '1'
        for cell, error in failures(where, int(sys.argv[2]), int(sys.argv[3])):
            print(f'FAILED {cell} {error}'[:300].replace('\n', ' '))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument('notebooks', nargs='+', type=Path)
        parser.add_argument('--seeds', type=int, default=5)
        parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
        args = parser.parse_args()
        main(args.notebooks, args.seeds, args.threads)
