"""Write requirements.lock: what a fresh environment gets today, for users and developers alike.

python tools/lock.py     (that is `make lock`)

The newest releases that settings.ini allows are installed into an environment that is thrown away
afterwards, and their versions are kept: versions alone, for the file is given to pip as constraints
(`pip install -c`), on any system and from any index. So it holds no hashes and no addresses, no
local versions (torch's builds differ), and no package that only some systems need.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import versions

lock = versions.root / 'requirements.lock'
OLDEST = (3, 11, 5)  # the oldest Python that the newest releases are made for; see the Makefile
SYSTEMS = [
    dict(os_name='posix', sys_platform='linux', platform_system='Linux', platform_machine='x86_64'),
    dict(
        os_name='posix', sys_platform='darwin', platform_system='Darwin', platform_machine='arm64'
    ),
    dict(os_name='nt', sys_platform='win32', platform_system='Windows', platform_machine='AMD64'),
]
HEAD = """\
# What `make demo` and `make test` install: written by `make lock` (see tools/lock.py), not by hand.
# Constraints for pip, versions alone; packages that only some systems need are not in it.
"""


def canonical(name):
    "A distribution's name as pip compares it"
    return re.sub(r'[-_.]+', '-', name).lower()


def needed(name, extras, system, installed):
    "The names of all that a distribution needs on a system, itself included"
    from packaging.requirements import Requirement

    seen, waiting = set(), [(name, extra) for extra in ('', *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name not in installed:
            continue
        seen.add((name, extra))
        for line in installed[name].requires or ():
            wanted = Requirement(line)
            if not wanted.marker or wanted.marker.evaluate(system | {'extra': extra}):
                waiting += [(canonical(wanted.name), e) for e in ('', *wanted.extras)]
    return {name for name, _ in seen}


def pins(project):
    "`name==version` of what the project's users and developers need on every system"
    installed = {canonical(d.metadata['Name']): d for d in distributions()}
    common = set.intersection(*(needed(project, {'dev'}, s, installed) for s in SYSTEMS))
    public = {name: installed[name].version.split('+')[0] for name in sorted(common - {project})}
    return [f'{name}=={version}' for name, version in public.items()]


def install_and_list(folder):
    "The pins of an environment that is made in a folder"
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = Path(folder) / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    pip = [python, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet']
    subprocess.run([*pip, '--use-pep517', f'{versions.root}[dev]'], check=True)
    listed = subprocess.run(
        [python, __file__, '--list'], check=True, capture_output=True, text=True
    )
    return listed.stdout.splitlines()


def main():
    if sys.version_info < OLDEST:
        sys.exit(f'the lock is made with Python {".".join(map(str, OLDEST))} or newer')
    with tempfile.TemporaryDirectory() as tmp:
        found = install_and_list(tmp)
    old = lock.read_text(encoding='utf-8').splitlines() if lock.exists() else []
    lock.write_text(HEAD + '\n'.join(found) + '\n', encoding='utf-8')
    for line in sorted({*old} ^ {*HEAD.splitlines(), *found}):
        print('-' if line in old else '+', line)
    print(f'{lock.name}: {len(found)} packages')


if __name__ == '__main__':
    if sys.argv[1:] == ['--list']:
        print(*pins(canonical(versions.project())), sep='\n')
    else:
        main()
