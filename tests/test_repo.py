"The notebooks are the source, wing by wing, and the package is exactly what they export."

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'tools'))
import versions  # noqa: E402

nbs, lib = root / 'nbs', root / 'clipcap'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
modules = sorted(lib.rglob('[!_]*.py'))
WINGS = ['base', '', 'methods', 'tools', 'cli']  # a wing imports only from those before it
SOLUTIONS = ['solutions', 'solutions/methods']  # of the lessons' exercises: they export nothing
last_cell = '#| hide\nimport nbdev\n\nnbdev.nbdev_export()'


def named(folder):
    return lambda path: path.relative_to(folder).with_suffix('').as_posix()


each_notebook = pytest.mark.parametrize('path', notebooks, ids=named(nbs))
solutions = [p for p in notebooks if p.is_relative_to(nbs / 'solutions')]
each_solution = pytest.mark.parametrize('path', solutions, ids=named(nbs))
each_module = pytest.mark.parametrize('path', modules, ids=named(lib))


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def code(path):
    return [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code']


def is_export(source):
    return re.match(r'#\s*\|\s*export', source) is not None


def target(path):
    "The module that a notebook exports, without `clipcap.`, or None"
    found = re.findall(r'(?m)^#\s*\|\s*default_exp\s+(\S+)', '\n'.join(code(path)))
    return found[0] if found else None


def canonical(name):
    return re.sub(r'[-_.]+', '-', name).lower()


def module_name(path):
    return '.'.join(path.relative_to(lib).with_suffix('').parts)


def wing(module):
    return module.rpartition('.')[0]


number = {target(p): int(p.name[:2]) for p in notebooks if target(p)}
tree = {module_name(p): ast.parse(p.read_text(encoding='utf-8')) for p in modules}


def imports(module):
    "Dotted names that a module imports, inside its functions too"
    home = ['clipcap', *module.split('.')[:-1]]
    for node in ast.walk(tree[module]):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = home[: len(home) - node.level + 1] if node.level else []
            base = '.'.join(start + [node.module] * bool(node.module))
            inside = base.removeprefix('clipcap').strip('.')
            if base.startswith('clipcap') and inside not in number:
                yield from (f'{base}.{a.name}' for a in node.names)  # modules of a package
            else:
                yield base


def public(module):
    "Functions and classes that a module offers"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [n for n in tree[module].body if isinstance(n, kinds) and not n.name.startswith('_')]


# ---- notebooks -> package
def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copy(root / 'settings.ini', tmp_path)
    shutil.copytree(nbs, tmp_path / 'nbs')
    (tmp_path / 'clipcap').mkdir()
    shutil.copy(lib / '__init__.py', tmp_path / 'clipcap')  # the front door, written by hand
    command = [sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()']
    subprocess.run(command, cwd=tmp_path, check=True)

    def sources(folder):
        return {p.relative_to(folder): p.read_text(encoding='utf-8') for p in folder.rglob('*.py')}

    message = 'run nbdev_export; remove modules whose notebook is gone'
    assert sources(lib) == sources(tmp_path / 'clipcap'), message


def test_notebooks_are_numbered_and_each_has_a_module_of_its_own():
    wings = {w or '.' for w in WINGS} | set(SOLUTIONS)
    assert {p.parent.relative_to(nbs).as_posix() for p in notebooks} <= wings
    assert all(re.fullmatch(r'\d\d_[a-z_]+', p.stem) for p in notebooks)
    places = [(p.parent, p.name[:2]) for p in notebooks]
    assert len(set(places)) == len(places), 'a number twice in one wing'
    targets = [target(p) for p in notebooks if target(p)]
    assert len(set(targets)) == len(targets), 'two notebooks export one module'
    for p in notebooks:
        own = '.'.join([*p.parent.relative_to(nbs).parts, p.stem[3:]])
        assert target(p) in (None, own)


@each_module
def test_module_imports_only_from_wings_above_and_lower_numbers(path):
    module = module_name(path)
    for name in imports(module):
        other = name.removeprefix('clipcap.')
        if not name.startswith('clipcap.') or other not in number:
            continue
        here, there = WINGS.index(wing(module)), WINGS.index(wing(other))
        assert there <= here, f'{module} imports {other}, from a wing below its own'
        if there == here:
            assert number[other] < number[module], f'{module} imports {other}, a later one'


def test_requirements_are_what_the_package_imports():
    asked = {canonical(name) for name in versions.requirements('requirements')}
    optional = {canonical(name) for key in versions.extras() for name in versions.requirements(key)}
    imported = {name.split('.')[0] for module in tree for name in imports(module)}
    imported -= {'clipcap'} | sys.stdlib_module_names
    assert not imported & {'nbdev', 'fastcore', 'execnb'}, "nbdev is a developer's tool"
    homes = packages_distributions()
    used = {name: {canonical(home) for home in homes.get(name, [name])} for name in imported}
    missing = [name for name, homes in used.items() if not homes & (asked | optional)]
    assert not missing, 'imported, but not required in settings.ini'
    indirect = {'ipywidgets'}  # what anywidget stands on, and what a notebook's reader expects
    assert not asked - set().union(indirect, *used.values()), 'required, but never imported'


@each_module
def test_module_is_documented(path):
    bare = [n.name for n in public(module_name(path)) if not ast.get_docstring(n)]
    assert not bare, 'public, without a docstring'


# ---- each notebook
@each_notebook
def test_notebook_has_a_title_and_exports_at_its_end(path):
    cells, sources = read(path)['cells'], code(path)
    first = ''.join(cells[0]['source'])
    assert re.match(r'# .+\n\s*> .+', first), 'begin with "# Title" and "> one line"'
    if path in solutions:
        return
    assert sources[-1] == ''.join(cells[-1]['source']) == last_cell, f'end with:\n{last_cell}'
    hidden = any('nbdev_export(' in s for s in sources[:-1])
    assert not hidden, 'nbdev_test skips a cell with nbdev_export('


@each_notebook
def test_notebook_checks_something(path):
    tried = '\n'.join(s for s in code(path) if not is_export(s))
    assert re.search(r'(?m)^\s*(assert\b|test_\w+\(|with pytest\.raises|refusal\()', tried)


@each_solution
def test_solutions_export_nothing_and_their_lesson_names_them(path):
    exports = [s for s in code(path) if '#| export' in s or '#| default_exp' in s or 'nbdev' in s]
    assert not exports
    lesson = nbs / path.relative_to(nbs / 'solutions')
    assert lesson.is_file(), 'solutions have the number and name of their lesson'
    up = '../' if lesson.parent.name == 'methods' else ''
    link = f'({up}{path.relative_to(nbs).as_posix()})'
    text = '\n'.join(''.join(c['source']) for c in read(lesson)['cells'])
    assert link in text, f'{lesson.name}: link the solutions: {link}'


def test_every_lesson_ends_with_exercises_that_are_solved():
    lessons = [*nbs.glob('*.ipynb'), *(nbs / 'methods').glob('*.ipynb')]
    solved = {path.relative_to(nbs / 'solutions') for path in solutions}
    assert {path.relative_to(nbs) for path in lessons} == solved
    for path in lessons:
        text = '\n'.join(''.join(c['source']) for c in read(path)['cells'])
        for heading in 'What you now know', 'Exercises', 'Further reading':
            assert f'## {heading}' in text, f'{path.name}: {heading}'


def names_in(text):
    return set(re.findall(r'\w+', text))


def reached():
    "Public names that a notebook tries, a test names, or such a one leads to"
    tried = [s for path in notebooks for s in code(path) if not is_export(s)]
    tests = [path.read_text(encoding='utf-8') for path in (root / 'tests').glob('*.py')]
    known, waiting = set(), set().union(*map(names_in, tried + tests))
    uses = {}
    statements = [node for module in tree.values() for node in module.body]
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        used = names_in(ast.unparse(node))
        name = getattr(node, 'name', None)
        if name is None or node.decorator_list:  # runs on import, or is a command of the shell
            waiting |= used
        else:
            uses.setdefault(name, set()).update(used)
    while waiting:
        name = waiting.pop()
        known.add(name)
        waiting |= uses.get(name, set()) - known
    return known


def test_nothing_is_exported_that_nobody_tries():
    names = {f'{module}.{node.name}': node.name for module in tree for node in public(module)}
    tried = reached()
    assert not [name for name, last in names.items() if last not in tried]


@each_notebook
def test_notebook_stores_small_plain_outputs(path):
    outputs = [o for c in read(path)['cells'] for o in c.get('outputs', [])]
    assert path.stat().st_size <= 300_000
    errors = [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not errors
    assert not [k for o in outputs for k in o.get('data', {}) if 'widget' in k]
    assert 'widgets' not in read(path)['metadata']
    lesson = path.parent.name in ('nbs', 'methods')
    assert outputs or not lesson, f'run: make notebooks NB={path.relative_to(root)}'


# ---- what git holds
def test_repository_holds_what_it_should(repo_files):
    known = """nbs clipcap data weights tests tools benchmarks .ci
        settings.ini setup.py requirements.lock ruff.toml Makefile MANIFEST.in
        README.md LICENSE .gitignore .gitattributes"""
    top = {p.parts[0] for p in repo_files}
    assert top == set(known.split()), top ^ set(known.split())

    def total(folder):
        return sum((root / p).stat().st_size for p in repo_files if p.is_relative_to(folder))

    assert not [str(p) for p in repo_files if (root / p).stat().st_size > 45e6]
    assert total('data') <= 1e6
    assert total('weights/tiny') <= 40e6


def test_no_photos_of_others(repo_files):
    flickr = re.compile(r'\d{6,}(_[0-9a-f]{8,})?\.(jpe?g|png|webp)', re.I)
    assert not [str(p) for p in repo_files if flickr.fullmatch(p.name)]
