"The form of the repository: the notebooks are the source, in their order, and the package is exactly what they export."
import ast, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
nbs, lib = root/'nbs', root/'clipcap'
notebooks, modules = sorted(nbs.glob('*.ipynb')), sorted(lib.glob('[!_]*.py'))
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
last_cell = '#| hide\nimport nbdev; nbdev.nbdev_export()'

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def code(path): return [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == 'code']
def is_export(source): return re.match(r'#\s*\|\s*export', source) is not None
def target(path): return next(iter(re.findall(r'(?m)^#\s*\|\s*default_exp\s+(\S+)', '\n'.join(code(path)))), None)
def canonical(name): return re.sub(r'[-_.]+', '-', name).lower()

number = {target(p): int(p.name[:2]) for p in notebooks}
tree = {p.stem: ast.parse(p.read_text(encoding='utf-8')) for p in modules}

def imports(module):
    "Dotted names that a module imports, inside its functions too; its neighbours as clipcap.x"
    for node in ast.walk(tree[module]):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(['clipcap']*bool(node.level) + [node.module]*bool(node.module))
            yield from [f'clipcap.{a.name}' for a in node.names] if base == 'clipcap' else [base]

def public(module):
    "Functions and classes that a module offers"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [n for n in tree[module].body if isinstance(n, kinds) and not n.name.startswith('_')]

# ---- notebooks -> package
def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copy(root/'settings.ini', tmp_path)
    shutil.copytree(nbs, tmp_path/'nbs')
    subprocess.run([sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()'], cwd=tmp_path, check=True)
    sources = lambda folder: {p.relative_to(folder): p.read_text(encoding='utf-8') for p in folder.rglob('*.py')}
    assert sources(lib) == sources(tmp_path/'clipcap'), 'run nbdev_export; remove modules whose notebook is gone'

def test_notebooks_are_numbered_and_each_has_a_module_of_its_own():
    assert all(re.fullmatch(r'\d\d_[a-z_]+', p.stem) for p in notebooks)
    assert len({p.name[:2] for p in notebooks}) == len({target(p) for p in notebooks}) == len(notebooks)
    assert all(p.stem[3:] == (target(p) or p.stem[3:]) for p in notebooks)

@each_module
def test_module_imports_only_earlier_ones(path):
    for name in imports(path.stem):
        neighbour = (name.split('.') + [''])[1]
        if name.startswith('clipcap.') and neighbour in number:
            assert number[neighbour] < number[path.stem], f'{path.name} imports {neighbour}, a later lesson'

def test_requirements_are_what_the_package_imports():
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    wanted = lambda *keys: {canonical(re.match(r'[\w.-]+', r)[0]) for key in keys for r in ini['DEFAULT'][key].split()}
    asked, extra = wanted('requirements'), wanted(*(k for k in ini['DEFAULT'] if k.endswith('_requirements') and k != 'dev_requirements'))
    names, homes = {n.split('.')[0] for m in tree for n in imports(m)} - {'clipcap'} - sys.stdlib_module_names, packages_distributions()
    assert not names & {'nbdev', 'fastcore', 'execnb'}, 'nbdev is a developer\'s tool'
    used = {n: {canonical(d) for d in homes.get(n, [n])} for n in names}
    assert not {n: d for n, d in used.items() if not d & (asked | extra)}, 'imported, but not required in settings.ini'
    assert not asked - set().union(*used.values()), 'required in settings.ini, but never imported'

@each_module
def test_module_is_short_and_documented(path):
    lines = [l for l in path.read_text(encoding='utf-8').splitlines() if l.strip() and not l.startswith('# %%')]
    assert len(lines) <= 250, f'{len(lines)} lines: say less, or make it two lessons'
    assert not [n.name for n in public(path.stem) if not ast.get_docstring(n)], 'public, without a docstring'

# ---- each notebook a lesson
@each_notebook
def test_notebook_is_a_lesson(path):
    cells, sources = read(path)['cells'], code(path)
    assert re.match(r'# .+\n\s*> .+', ''.join(cells[0]['source'])), 'begin with "# Title" and "> one line"'
    assert sources[-1] == ''.join(cells[-1]['source']) == last_cell, f'end with the hidden cell:\n{last_cell}'
    assert not any('nbdev_export(' in s for s in sources[:-1]), 'nbdev_test skips a cell with nbdev_export('
    for source in filter(is_export, sources):
        lines = [l for l in source.splitlines() if l.strip() and not re.match(r'#\s*\|', l)]
        assert len(lines) <= 25, f'{len(lines)} lines in the exported cell of: {lines[0]}'

@each_notebook
def test_notebook_tries_and_checks_what_it_exports(path):
    tried = [s for s in code(path) if not is_export(s)]
    assert any(re.search(r'(?m)^\s*assert\b', s) for s in tried), 'no assert'
    if target(path):
        missed = [n.name for n in public(target(path)) if not any(re.search(rf'\b{n.name}\b', s) for s in tried)]
        assert not missed, 'exported, but never used in the lesson'

@each_notebook
def test_notebook_stores_small_plain_outputs(path):
    outputs = [o for c in read(path)['cells'] for o in c.get('outputs', [])]
    assert path.stat().st_size <= 300_000
    assert outputs, f'run: make notebooks NB={path.relative_to(root)}'
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not [k for o in outputs for k in o.get('data', {}) if 'widget' in k]
    assert 'widgets' not in read(path)['metadata']

# ---- what git holds
def test_repository_holds_what_it_should(repo_files):
    top = {p.parts[0] for p in repo_files}
    known = 'nbs clipcap data weights tests .ci settings.ini setup.py README.md LICENSE MANIFEST.in Makefile .gitignore .gitattributes'
    assert top == set(known.split()), top ^ set(known.split())
    total = lambda folder: sum((root/p).stat().st_size for p in repo_files if p.is_relative_to(folder))
    assert not [str(p) for p in repo_files if (root/p).stat().st_size > 45e6]
    assert total('data') <= 1e6 and total('weights/tiny') <= 40e6

def test_no_photos_of_others(repo_files):
    flickr = re.compile(r'\d{6,}(_[0-9a-f]{8,})?\.(jpe?g|png|webp)', re.I)
    assert not [str(p) for p in repo_files if flickr.fullmatch(p.name)]
