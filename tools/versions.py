"""The versions that settings.ini allows.

python tools/versions.py lowest     the lower bound of each requirement, as `name==version`

`make test-lowest` gives that to pip as constraints, so a bound that is too low is found out. Only
the standard library is used: this runs before anything is installed."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def settings():
    "The project's settings, as a mapping"
    ini = ConfigParser(delimiters=['='])
    ini.read(root / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def project():
    "The name under which the project is installed: `clipcap` is another project's on PyPI"
    return settings()['lib_name']


def extras():
    "The keys of settings.ini that hold what only some users need"
    keys = [key for key in settings() if key.endswith('_requirements')]
    return [key for key in keys if key != 'dev_requirements']


def requirements(key):
    "name -> its specifiers, such as ['>=1.2', '<2'], of what stands under a key of settings.ini"
    found = {}
    for item in settings()[key].split():
        name, specifiers = re.fullmatch(r'([\w.-]+)(.*)', item).groups()
        found[name] = [s for s in specifiers.split(',') if s]
    return found


def lowest():
    "`name==version` with the lower bound of every requirement of users and developers"
    everything = requirements('requirements') | requirements('dev_requirements')
    for name, specifiers in everything.items():
        bounds = [s.removeprefix('>=') for s in specifiers if s.startswith('>=')]
        if len(bounds) != 1:
            sys.exit(f'settings.ini: {name} needs one lower bound: {name}>=...')
        yield f'{name}=={bounds[0]}'


if __name__ == '__main__':
    if sys.argv[1:] != ['lowest']:
        sys.exit(__doc__)
    print(*lowest(), sep='\n')
