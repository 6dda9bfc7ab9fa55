"What may go wrong in each step that touches a file: errors, Ctrl-C, a power cut"

import errno
import itertools
import os
import signal
import sys

CHANGES = {'os.rename', 'os.mkdir', 'os.chmod', 'os.remove', 'os.rmdir', 'os.listdir', 'open'}
_fault = {'at': None}  # what the hook below does with the n-th step in a folder


def _strike(event, arguments):
    # CPython tells its audit hooks of each call that touches a file, before it is made
    if _fault['at'] is None or event not in CHANGES:
        return
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(
        _fault['folder']
    ):
        return
    _fault['steps'] += 1
    if _fault['steps'] == _fault['at'] or (_fault['lasting'] and _fault['steps'] > _fault['at']):
        _fault['act']()


sys.addaudithook(_strike)


class Striking:
    "Do `act` in the n-th step that touches a file in `folder` (and, lasting, in all after it)"

    def __init__(self, folder, at, act, lasting=False):
        self.settings = {
            'folder': str(folder),
            'at': at,
            'act': act,
            'lasting': lasting,
            'steps': 0,
        }

    def __enter__(self):
        _fault.update(self.settings)
        return self

    def __exit__(self, *_):
        self.struck = _fault['steps'] >= _fault['at']
        _fault['at'] = None


def no_space():
    raise OSError(errno.ENOSPC, 'No space left on device')


def interrupt():
    raise KeyboardInterrupt


def power_cut():
    os.kill(os.getpid(), signal.SIGKILL)


def fail_at_call(monkeypatch, owner, name, number, fault=KeyboardInterrupt):
    "Let one call of a function raise, the calls numbered from 0"
    real, numbers = getattr(owner, name), itertools.count()

    def failing(*arguments):
        if next(numbers) == number:
            raise fault
        return real(*arguments)

    monkeypatch.setattr(owner, name, failing)
