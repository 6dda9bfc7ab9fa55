"clipcap.base.files where everything fails: each step of a write, the power, another run, odd names"

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import refusal
from faults import Striking, interrupt, no_space, power_cut

from clipcap.base import files
from clipcap.base.files import (
    ClipcapError,
    lock,
    one_line,
    read_json,
    recover_folder,
    write_bytes,
    write_file,
    write_folder,
    write_json,
    write_text,
)

posix = pytest.mark.skipif(os.name == 'nt', reason='what only POSIX has')


def names(folder):
    return sorted(os.listdir(folder))


def model(text):
    "What `write_folder` calls: two files and a sub-folder, all saying `text`"

    def write(new):
        (new / 'language').mkdir()
        for name in ('config.json', 'language/config.json'):
            (new / name).write_text(text)

    return write


def says(folder):
    "What the files of a model say; fails unless it is whole and they say the same"
    texts = {(folder / name).read_text() for name in ('config.json', 'language/config.json')}
    assert len(texts) == 1
    return texts.pop()


# ---- a file
@pytest.mark.parametrize('act', [no_space, interrupt])
@pytest.mark.parametrize('before', [None, 'old'])
def test_a_file_is_the_old_or_the_new_whichever_step_fails(tmp_path, act, before):
    for at in range(1, 100):
        folder = tmp_path / str(at)
        path = folder / 'a.txt'
        if before:
            write_text(path, before)
        strike = Striking(folder, at, act)
        try:
            with strike:
                write_text(path, 'new')
        except (ClipcapError, KeyboardInterrupt) as fault:
            assert isinstance(fault, KeyboardInterrupt) or str(path) in str(fault)
        assert not path.exists() or path.read_text() in ('new', before)
        assert before is None or path.exists()
        if not strike.struck:
            break
        write_text(path, 'again')
        assert path.read_text() == 'again'
    assert 4 < at < 99 and names(folder) == ['a.txt']


def test_a_failing_fsync_keeps_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / 'a.txt', 'old')

    def fails(handle):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(os, 'fsync', fails)
    assert 'Input/output error' in refusal(write_text, tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text() == 'old' and names(tmp_path) == ['a.txt']


def test_fsync_is_called_as_windows_wants_it(tmp_path, monkeypatch):
    import fcntl

    real, modes = os.fsync, []

    def fsync(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        real(handle)

    monkeypatch.setattr(os, 'fsync', fsync)
    write_text(tmp_path / 'a.txt', 'a')
    write_folder(tmp_path / 'model', model('a'))
    assert len(modes) == 3 and os.O_RDONLY not in modes


def test_a_file_that_another_has_open_is_waited_for(tmp_path, monkeypatch):
    "On Windows a scanner or a reader makes the rename fail for a moment"
    real, left = os.replace, [2]

    def replace(source, target):
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, 'The process cannot access the file')
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    write_text(tmp_path / 'a.txt', 'first')
    left[0] = 2
    write_folder(tmp_path / 'model', model('second'))
    assert (tmp_path / 'a.txt').read_text() == 'first' and says(tmp_path / 'model') == 'second'
    left[0] = 99
    assert 'rights' in refusal(write_text, tmp_path / 'a.txt', 'never')
    assert names(tmp_path) == ['a.txt', 'model']


@posix
def test_rights_are_as_umask_says_or_as_before(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / 'a.txt', 'a')
        assert (tmp_path / 'a.txt').stat().st_mode & 0o777 == 0o640

        def private(part):
            part.unlink()
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))  # as some writers do

        write_file(tmp_path / 'b.txt', private)
        assert (tmp_path / 'b.txt').stat().st_mode & 0o777 == 0o640
        (tmp_path / 'a.txt').chmod(0o604)
        write_text(tmp_path / 'a.txt', 'b')
        assert (tmp_path / 'a.txt').stat().st_mode & 0o777 == 0o604

        def closed(new):
            private(new / 'config.json') if (new / 'config.json').exists() else None
            os.close(os.open(new / 'config.json', os.O_CREAT | os.O_WRONLY, 0o600))

        write_folder(tmp_path / 'model', closed)
        assert (tmp_path / 'model').stat().st_mode & 0o777 == 0o750
        assert (tmp_path / 'model' / 'config.json').stat().st_mode & 0o777 == 0o640
        (tmp_path / 'model').chmod(0o700)
        write_folder(tmp_path / 'model', closed)
        assert (tmp_path / 'model').stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@posix
def test_links_pipes_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link.txt').symlink_to(tmp_path / 'disk' / 'real.txt')
    (tmp_path / 'best').symlink_to(tmp_path / 'disk' / 'model')
    write_text(tmp_path / 'link.txt', 'a')
    write_folder(tmp_path / 'best', model('a'))
    write_folder(tmp_path / 'best', model('b'))
    assert (tmp_path / 'link.txt').is_symlink() and (tmp_path / 'best').is_symlink()
    assert names(tmp_path / 'disk') == ['model', 'real.txt'] and says(tmp_path / 'best') == 'b'
    write_text('/dev/null', 'nothing')
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode)
    os.mkfifo(tmp_path / 'pipe')
    command = [sys.executable, '-c', f'print(open({str(tmp_path / "pipe")!r}).read())']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        write_text(tmp_path / 'pipe', 'through')
        assert reader.communicate(timeout=20)[0] == 'through\n'
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)


def test_odd_places_are_refused_in_one_line(tmp_path):
    write_text(tmp_path / 'file', '')
    assert 'a part of this path is a file' in refusal(write_text, tmp_path / 'file' / 'a.txt', '')
    assert 'this is a folder' in refusal(write_text, tmp_path, '')
    assert 'shorter name' in refusal(write_text, tmp_path / ('é' * 200), '')
    assert 'null' in refusal(write_text, tmp_path / 'a\0b', '')
    assert 'this is a file' in refusal(write_folder, tmp_path / 'file', model(''))
    assert 'null' in refusal(write_folder, tmp_path / 'a\0b', model(''))
    told = refusal(write_folder, tmp_path / 'file' / 'model', model(''))
    assert told.startswith(f'{tmp_path}/file/model: cannot be written')
    assert names(tmp_path) == ['file']


@pytest.mark.parametrize('suffix', ['', '.json', '.' + 'x' * 240])
def test_names_of_any_length_that_the_system_takes(tmp_path, suffix):
    name = 'é' * ((255 - len(suffix)) // 2) + suffix
    write_text(tmp_path / name, 'long')
    write_folder(tmp_path / 'f' / name, model('a'))
    write_folder(tmp_path / 'f' / name, model('b'))
    with lock(tmp_path / 'g' / name):
        pass
    assert names(tmp_path) == sorted(['f', 'g', name]) and says(tmp_path / 'f' / name) == 'b'


@posix
def test_temporary_files_of_the_dead_go_with_the_next_lock(tmp_path):
    code = 'import os, sys\nfrom clipcap.base.files import write_file\n'
    code += 'write_file(sys.argv[1], lambda part: os.kill(os.getpid(), 9))'
    assert subprocess.run([sys.executable, '-c', code, tmp_path / 'a.txt']).returncode == -9
    assert len(names(tmp_path)) == 1

    def during(part):
        with lock(tmp_path):
            assert len(names(tmp_path)) == 1  # the dead one's is gone, ours is not

    write_file(tmp_path / 'b.txt', during)
    assert names(tmp_path) == ['b.txt']


# ---- a folder
@pytest.mark.parametrize('act', [no_space, interrupt])
@pytest.mark.parametrize('before', [None, 'old'])
@pytest.mark.parametrize('lasting', [False, True])
def test_a_folder_is_the_old_or_the_new_whichever_steps_fail(tmp_path, act, before, lasting):
    for at in range(1, 200):
        place = tmp_path / str(at)
        folder = place / 'model'
        if before:
            write_folder(folder, model(before))
        strike = Striking(place, at, act, lasting)
        try:
            with strike:
                write_folder(folder, model('new'))
        except (ClipcapError, KeyboardInterrupt, OSError) as fault:
            assert not isinstance(fault, OSError), fault
        there = recover_folder(folder)
        assert not there or says(folder) in ('new', before)
        assert there or before is None
        if not strike.struck:
            break
        write_folder(folder, model('again'))  # and the failed one's remains go
        assert says(folder) == 'again' and names(place) == ['model']
    assert 10 < at < 199 and names(place) == ['model']


@posix
@pytest.mark.parametrize('before', [None, 'old'])
def test_a_folder_is_the_old_or_the_new_whenever_the_power_is_cut(tmp_path, before):
    for at in range(1, 200):
        place = tmp_path / str(at)
        folder = place / 'model'
        if before:
            write_folder(folder, model(before))
        child = os.fork()
        if not child:
            with Striking(place, at, power_cut):
                write_folder(folder, model('new'))
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        there = recover_folder(folder)
        assert not there or says(folder) in ('new', before)
        assert there or before is None
        write_folder(folder, model('again'))
        assert says(folder) == 'again' and names(place) == ['model']
        if not killed:
            break
    assert 10 < at < 199


def test_other_peoples_folders_are_not_replaced(tmp_path):
    write_text(tmp_path / 'home' / 'letter.txt', 'dear')
    assert 'letter.txt' in refusal(write_folder, tmp_path / 'home', model('new'))
    assert names(tmp_path / 'home') == ['letter.txt'] and names(tmp_path) == ['home']
    (tmp_path / 'empty').mkdir()
    write_folder(tmp_path / 'empty', model('new'))
    assert says(tmp_path / 'empty') == 'new'


# ---- SIGTERM
@posix
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_nothing_temporary_stays_when_the_system_asks_to_end(tmp_path, number):
    code = f"""
import os, time
from clipcap.base.files import end_cleanly_on_sigterm, lock, write_folder
end_cleanly_on_sigterm()
def write(new):
    (new/'half').write_text('half')
    os.kill(os.getpid(), {number})
    time.sleep(60)
with lock({str(tmp_path / 'run')!r}):
    write_folder({str(tmp_path / 'run' / 'best')!r}, write)
"""
    assert subprocess.run([sys.executable, '-c', code], timeout=30).returncode == 128 + number
    assert names(tmp_path) == ['run'] and names(tmp_path / 'run') == []


@posix
def test_a_signal_within_a_finaliser_is_not_lost():
    code = """
import os, signal, time
from clipcap.base.files import end_cleanly_on_sigterm
end_cleanly_on_sigterm()
class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the exception is raised, and dropped, here
            pass
Closing()
time.sleep(60)
"""
    ended = subprocess.run([sys.executable, '-c', code], timeout=30, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, b'')


def test_other_faults_of_a_finaliser_are_still_reported():
    code = """
from clipcap.base.files import end_cleanly_on_sigterm
end_cleanly_on_sigterm()
class Closing:
    def __del__(self):
        raise ValueError('unclosed')
Closing()
"""
    ended = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and 'ValueError: unclosed' in ended.stderr


# ---- the lock
HOLDER = """
import sys
from clipcap.base.files import lock
with lock(sys.argv[1], *sys.argv[2:]):
    print('holds', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    "Another process that holds a lock until it is told or killed"
    started = []

    def start(folder, *what):
        command = [sys.executable, '-c', HOLDER, folder, *what]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b'holds\n'
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_run_is_told_who_works_there(tmp_path, holder):
    process = holder(tmp_path / 'store', 'embed\tof photos')
    with pytest.raises(ClipcapError) as caught, lock(tmp_path / 'store'):
        pass
    told = str(caught.value)
    assert told.startswith(f'{tmp_path / "store"}: in use by process {process.pid} (embed')
    assert time.strftime('%Y-') in told and told.endswith('; wait for it, or give another folder')
    with lock(tmp_path / 'other'):
        pass
    process.communicate()  # it ends
    with lock(tmp_path / 'store'):
        pass
    assert names(tmp_path) == []


def test_a_dead_process_holds_nothing(tmp_path, holder):
    process = holder(tmp_path / 'store')
    process.kill()
    process.wait()
    with lock(tmp_path / 'store'):
        pass
    assert names(tmp_path) == []


@posix
def test_a_child_does_not_hold_on_to_the_lock_of_a_dead_parent(tmp_path):
    code = f"""
import os, sys, time
from clipcap.base.files import lock
with lock({str(tmp_path / 'store')!r}):
    if os.fork():
        os.kill(os.getpid(), 9)
    sys.stdout.close()
    os.close(1)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        parent.wait()
        try:
            with lock(tmp_path / 'store'):
                pass
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


@posix
def test_one_lock_for_one_folder_whatever_it_is_called(tmp_path, holder, monkeypatch):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'store').symlink_to(tmp_path / 'disk')
    holder(tmp_path / 'store')
    monkeypatch.chdir(tmp_path / 'disk')
    for name in (tmp_path / 'disk', '.', '../store', f'{tmp_path}/x/../disk/'):
        with pytest.raises(ClipcapError, match='in use by process'), lock(name):
            pass


def test_a_thread_may_take_its_lock_again_another_may_not(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def take():
        with lock(tmp_path / 'store'):
            return 'taken'

    with ThreadPoolExecutor(1) as pool:
        with lock(tmp_path / 'store'):
            assert take() == 'taken'
            assert 'another thread' in refusal(pool.submit(take).result)
        assert pool.submit(take).result() == 'taken'


def test_a_folder_may_be_written_by_the_run_that_has_locked_it(tmp_path):
    with lock(tmp_path / 'aligner'):
        write_folder(tmp_path / 'aligner', model('a'))
        write_folder(tmp_path / 'aligner', model('b'))
        command = [sys.executable, '-c', HOLDER, tmp_path / 'aligner']
        second = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert 'in use by process' in second.stderr
    assert names(tmp_path) == ['aligner']


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unknown(handle):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(files, '_try_lock', unknown)
    with pytest.warns(UserWarning, match='no locks on this file system'), lock(tmp_path / 'store'):
        pass


def test_of_many_processes_that_want_it_one_has_it(tmp_path):
    code = f"""
from clipcap.base.files import ClipcapError, lock
import os, time
done = 0
while done < 30:
    try:
        with lock({str(tmp_path / 'store')!r}):
            os.close(os.open({str(tmp_path / 'inside')!r}, os.O_CREAT | os.O_EXCL))
            os.unlink({str(tmp_path / 'inside')!r})
            done += 1
    except ClipcapError:
        time.sleep(.001)
"""
    processes = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4


# ---- JSON
@pytest.mark.parametrize(
    'content, reason',
    {
        b'': 'not JSON',
        b'\xff\xfe{}': 'not UTF-8',
        b'[' * 1_000_000: 'not JSON',
        b'{"a":' * 1_000_000: 'not JSON',
        b'[]': 'must be an object, not a list',
        b'null': 'must be an object, not null',
        b'{}': 'a is missing',
        b'{"a": "1"}': 'a must be a whole number, not a text',
        b'{"a": true}': 'a must be a whole number, not true or false',
        b'{"a": 1e999}': 'a must be a whole number',
        b'{"a": ' + b'9' * 5000 + b'}': 'not JSON',
    }.items(),
)
def test_json_faults_are_one_line(tmp_path, content, reason):
    write_bytes(tmp_path / 'a.json', content)
    assert reason in refusal(read_json, tmp_path / 'a.json', {'a': int})


def test_json_that_cannot_be_read_or_written(tmp_path):
    assert 'No such file' in refusal(read_json, tmp_path / 'a.json')
    assert 'not a file' in refusal(read_json, tmp_path)
    if os.name != 'nt':
        os.mkfifo(tmp_path / 'pipe')
        assert 'not a file' in refusal(read_json, tmp_path / 'pipe')
    loop = []
    loop.append(loop)
    for value in (float('inf'), {1j}, loop, {(1, 2): 3}):
        assert 'as JSON' in refusal(write_json, tmp_path / 'b.json', value)
    odd = {'name': os.fsdecode(b'caf\xe9.jpg'), 'alone': '\ud800', 'bird': '鳥'}
    write_json(tmp_path / 'c.json', odd)
    assert (
        read_json(tmp_path / 'c.json') == odd
        and json.loads((tmp_path / 'c.json').read_bytes()) == odd
    )
    write_text(tmp_path / 'd.txt', odd['name'])
    assert (tmp_path / 'd.txt').read_bytes() == b'caf\xe9.jpg'
    write_bytes(tmp_path / 'e.json', b'\xef\xbb\xbf{}')
    assert read_json(tmp_path / 'e.json', dict) == {}


def test_messages_keep_to_their_line():
    name = 'a\r\nb\x1b[31m\u2028\u202e' + os.fsdecode(b'\xe9') + '.jpg'
    told = str(ClipcapError(f'{name}: not a photo'))
    assert told == r'a\r\nb\x1b[31m\u2028\u202e\xe9.jpg: not a photo'
    told.encode('utf-8')
    assert one_line('日本　語 naïve') == '日本　語 naïve'


def test_the_part_is_quick_to_import():
    "It is what `clipcap -h` stands on"
    code = 'import sys, clipcap.base.files\n'
    code += 'print([name for name in ("numpy", "torch", "PIL") if name in sys.modules])'
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
        == '[]\n'
    )


def test_each_mechanism_stands_once():
    "Writing whole or not at all, and locking, are done here; the store alone appends to its rows"
    package = Path(files.__file__).parent.parent
    pattern = r'os\.(replace|rename|fsync)\(|mkstemp|mkdtemp\(|shutil\.move|\b(fcntl|msvcrt)\b'
    others = {}
    for path in package.rglob('*.py'):
        calls = {found[0] for found in re.finditer(pattern, path.read_text(encoding='utf-8'))}
        if calls and path != Path(files.__file__):
            others[path.relative_to(package).as_posix()] = calls
    assert others == {'base/store.py': {'os.fsync('}}
