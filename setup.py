"""Package metadata lives in settings.ini, shared with nbdev; edit there, not here."""

from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, rmtree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='])
ini.read_string((root / 'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']


def words(key):
    return cfg.get(key, '').split()


def extras():
    "name -> requirements of each extra, and `all` of those that users may want"
    found = {
        key.removesuffix('_requirements'): words(key)
        for key in cfg
        if key.endswith('_requirements')
    }
    wanted = [r for name, requirements in found.items() if name != 'dev' for r in requirements]
    return found | {'all': list(dict.fromkeys(wanted))}


class BuildWithModel(build_py):
    "A wheel carries weights/tiny as clipcap/weights/tiny; an editable install finds it in place"

    def run(self):
        super().run()
        if self.editable_mode:
            return
        bundled = Path(self.build_lib) / cfg['lib_path'] / 'weights' / 'tiny'
        rmtree(bundled, ignore_errors=True)
        copytree(root / 'weights' / 'tiny', bundled)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license=cfg['license'],
    keywords=cfg['keywords'],
    url=cfg['git_url'],
    long_description=(root / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    cmdclass={'build_py': BuildWithModel},
    python_requires='>=' + cfg['min_python'],
    install_requires=words('requirements'),
    extras_require=extras(),
    entry_points={
        'console_scripts': words('console_scripts'),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
