"""What must hold of the source tree. Each check returns its complaints as a list of sentences; none means all is well.

The budgets are counted so: a code cell's lines are those that are not blank and no directive; a module's lines are
those that are not blank and not nbdev's own; words are counted outside fenced code, and for a cell's limit outside
tables too; words per line of code are counted over the cells that a reader sees, without those marked `#| hide`.
"""
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

import pytest

from tests.notebooks import WIDGET_VIEW, code, directives, is_run, read, render, run, source, text

HEAVY = ("torch", "transformers", "datasets", "ipywidgets", "matplotlib", "trl", "peft", "accelerate", "bitsandbytes")
CODE_LINES, EXPORTED_LINES, BODY_LINES, PROSE_WORDS, CELLS, MODULE_LINES, COLUMNS = 30, 40, 30, 150, 160, 400, 120
WORDS_PER_LINE, USED_WITHIN, USED_SHARE, OUTPUT_LINES, NOTEBOOK_KB = 2.5, 3, 0.95, 40, 200


def none_of(problems) -> None:
    "Fail the test that calls this, and list all problems."
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


# --- the tree -------------------------------------------------------------------------------------------------------
def chapters(root) -> list:
    "The chapters' notebooks, in their order."
    return sorted(Path(root).glob("nbs/[0-9][0-9][0-9]_*.ipynb"))


def modules(root) -> dict:
    "The modules that chapters export, {name: path}."
    return {path.stem: path for path in sorted(Path(root).glob("finetuning_kit/[!_]*.py"))}


def parse(cell) -> ast.Module:
    "A code cell's syntax tree, without IPython's own commands."
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code(cell), flags=re.M))


def code_cells(notebook) -> list:
    "The code cells with their place in the notebook, [(place, cell)]."
    return [(i, cell) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code" and code(cell)]


def is_exported(cell) -> bool:
    "Does nbdev put this cell into the module?"
    return bool(directives(cell).keys() & {"export", "exports", "exporti"})


def public_names(root) -> dict:
    "What each module exports, {module: [name]}."
    found = {}
    for name, path in modules(root).items():
        assigned = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
        listed = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
        found[name] = listed[0] if listed else []
    return found


def python(script, *arguments, root) -> subprocess.CompletedProcess:
    "Run a script in a new process that imports the package from `root`."
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=root, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})


# --- modules --------------------------------------------------------------------------------------------------------
def export_problems(root) -> list:
    "The modules are what nbdev-export makes of the notebooks, byte for byte, and there are no others."
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        shutil.copytree(Path(root, "nbs"), fresh / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copy(Path(root, "pyproject.toml"), fresh)
        (fresh / "finetuning_kit").mkdir()
        command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
        subprocess.run(command, cwd=fresh, check=True, env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
        made, there = modules(fresh), modules(root)
        problems = [f"{name}.py: no notebook exports it; delete it" for name in there.keys() - made.keys()]
        problems += [f"{name}.py is missing: run `make export`" for name in made.keys() - there.keys()]
        both = sorted(made.keys() & there.keys())
        differ = [name for name in both if made[name].read_bytes() != there[name].read_bytes()]
        advice = "run `make export`, or `nbdev-update` to keep what the module says"
        return problems + [f"{name}.py differs from its notebook: {advice}" for name in differ]


def imported_modules(cell, homes) -> set:
    "The package's modules that a cell imports from; `homes` says where a top-level name lives, {name: module}."
    found = set()
    for node in ast.walk(parse(cell)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finetuning_kit.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "finetuning_kit":
            found |= {homes.get(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetuning_kit."):
            found.add(node.module.split(".")[1])
    return found


def layer_problems(root) -> list:
    "Chapters are numbered without a gap, named after their module, and import only from lower numbers."
    paths, problems = chapters(root), []
    number = {path.stem[4:]: i for i, path in enumerate(paths)}
    homes = {name: module for module, names in public_names(root).items() for name in names}
    problems += [f"{path.name}: a notebook is called NNN_name.ipynb or index.ipynb"
                 for path in sorted(Path(root).glob("nbs/*.ipynb")) if path not in paths and path.name != "index.ipynb"]
    for i, path in enumerate(paths):
        cells = code_cells(read(path))
        if int(path.name[:3]) != i:
            problems.append(f"{path.name}: the next number in order is {i:03}")
        exports = [directives(cell)["default_exp"] for cell in read(path)["cells"] if "default_exp" in directives(cell)]
        if exports != [path.stem[4:]]:
            problems.append(f"{path.name}: default_exp is {exports}, not {path.stem[4:]}")
        problems += [f"{path.name} cell {place}: imports from `{name}`, which is no lower chapter"
                     for place, cell in cells for name in sorted(imported_modules(cell, homes))
                     if number.get(name, len(paths)) >= i]
    return problems


def blocked_import_problems(root, names, blocked=HEAVY) -> list:
    "The modules can be imported where the heavy packages are missing."
    problems = []
    for name in names:
        script = "import sys; sys.modules.update(dict.fromkeys(sys.argv[2:])); __import__(sys.argv[1])"
        done = python(script, f"finetuning_kit.{name}", *blocked, root=root)
        if done.returncode:
            problems.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return problems


def loaded_problems(root, script, heavy=HEAVY) -> list:
    "Running the script loads none of the heavy packages."
    report = "import sys; print('loaded:', *(set(sys.modules) & set(sys.argv[1:])))"
    done = python(f"import atexit; atexit.register(lambda: exec({report!r}))\n{script}", *heavy, root=root)
    loaded = done.stdout.rpartition("loaded:")[2].split()
    return ([done.stderr] if done.returncode else []) + [f"{name} was loaded" for name in sorted(loaded)]


def documented(function, comments) -> list:
    "What a function lacks: a docstring, a comment behind each parameter, a comment behind the head if it returns."
    docstring = ast.get_docstring(function) or ""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    arguments = [argument for argument in arguments if argument]
    lacks = [] if docstring else ["has no docstring"]
    lacks += [f"parameter `{argument.arg}` has no comment" for argument in arguments
              if argument.end_lineno not in comments and f"`{argument.arg}`" not in docstring]
    returns = any(isinstance(node, ast.Return) and node.value for node in ast.walk(function))
    parts = [function.lineno, *(argument.end_lineno for argument in arguments)]
    behind = {line for line in comments if max(parts) <= line < function.body[0].lineno}
    closed = behind - {parts[-1]} if arguments and function.lineno != parts[-1] else behind
    return lacks + ["has no comment behind what it returns"] * (returns and not closed)


def documentation_problems(path) -> list:
    "Every public function, class, method and dataclass field of a module says what it is."
    module = Path(path).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(module).readline)
    comments, problems = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}, []
    for node in ast.parse(module).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            problems += [f"`{node.name}` {lack}" for lack in documented(node, comments)]
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            problems += [] if ast.get_docstring(node) else [f"`{node.name}` has no docstring"]
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name[0] != "_"
                       and not node.bases]  # a method that overrides another inherits its docstring
            problems += [f"`{node.name}.{m.name}` has no docstring" for m in methods if not ast.get_docstring(m)]
            if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                problems += [f"`{node.name}.{ast.unparse(f.target)}` has no comment" for f in fields
                             if f.end_lineno not in comments and f.lineno not in comments]
    return [f"{Path(path).name}: {problem}" for problem in problems]


def public_name_problems(root) -> list:
    "Every public name comes from one module only, can be had from the top level, and is no module's name."
    names, problems = public_names(root), []
    for module, exported in names.items():
        others = {name for other in names if other != module for name in names[other]}
        problems += [f"`{name}` is exported by {module} and by another module" for name in sorted({*exported} & others)]
        problems += [f"`{name}`, exported by {module}, is a module's name too" for name in exported if name in names]
    everything = [name for exported in names.values() for name in exported]
    script = "import sys, finetuning_kit as kit; names = sys.argv[1:]; [getattr(kit, name) for name in names]"
    done = python(f"{script}; assert {{*names}} <= {{*dir(kit)}}", *everything, root=root)
    return problems + ([done.stderr.strip().splitlines()[-1]] if done.returncode else [])


# --- pages ----------------------------------------------------------------------------------------------------------
def shows_something(cell) -> bool:
    "Does a cell print, or end in a bare value? (Calls may return nothing, so they don't count.)"
    body = parse(cell).body
    if not body or code(cell).rstrip().endswith(";"):
        return False
    prints = any(isinstance(node, ast.Expr) and ast.unparse(node).startswith("print(") for node in body)
    last = body[-1].value if isinstance(body[-1], ast.Expr) else None
    return prints or isinstance(last, (ast.Name, ast.Subscript, ast.Tuple, ast.List, ast.Dict, ast.BinOp, ast.Compare))


def output_text(output) -> str:
    "The lines that a reader of a stored output sees."
    data = output.get("data", {})
    return text(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")


def run_problems(path, flags=()) -> list:
    "The notebook runs, and the cells that show something are those that have stored outputs."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        outputs = run(path, flags)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"{Path(path).name} stopped: " + re.sub(r"\x1b\[[\d;]*m", "", str(error))]
    stored = {cell["id"]: cell for cell in read(path)["cells"] if cell["id"] in outputs}
    shows = {True: "shows something, but has no stored output", False: "has a stored output, but shows nothing"}
    return [f"{Path(path).name} ({code(stored[key]).splitlines()[0][:40]}) {shows[bool(new)]}; store its outputs anew"
            for key, new in outputs.items() if bool(new) != bool(stored[key]["outputs"])]


def output_problems(path) -> list:
    "Stored outputs are there, short, and free of errors, warnings, widgets and paths of the machine that made them."
    notebook, problems = read(path), []
    forbidden = {
        "an error": r"Traceback \(most recent call last\)", "a warning": r"Warning: ",
        "a memory address": r" at 0x[0-9a-f]{6,}",
        "an absolute path": r"(?<![\w.:/~])/(tmp|home|root|work|usr|var|opt|mnt|private|Users|content|kaggle)/|file://"}
    if "widgets" in notebook["metadata"]:
        problems.append("the notebook's metadata holds widget state")
    if any("lines_to_next_cell" in cell["metadata"] for cell in notebook["cells"]):
        problems.append("a cell holds jupytext's metadata; `nbdev-clean` removes it")
    if Path(path).stat().st_size > NOTEBOOK_KB * 1000:
        problems.append(f"the notebook has {Path(path).stat().st_size / 1000:.0f} KB; the limit is {NOTEBOOK_KB}")
    for place, cell in code_cells(notebook):
        outputs = cell["outputs"]
        lacks = is_run(cell) and not outputs and shows_something(cell)
        complaints = ["prints, but has no stored output"] * lacks
        complaints += ["holds an error"] * any(output["output_type"] == "error" for output in outputs)
        complaints += ["holds text of the error stream"] * any(output.get("name") == "stderr" for output in outputs)
        complaints += ["holds a widget view"] * any(WIDGET_VIEW in output.get("data", {}) for output in outputs)
        everything = "\n".join(text(value) for output in outputs for value in [output.get("text", ""), *(
            value for mime, value in output.get("data", {}).items() if mime.startswith("text"))])
        complaints += [f"shows {what}" for what, pattern in forbidden.items() if re.search(pattern, everything)]
        n_lines = sum(len(output_text(output).splitlines()) for output in outputs)
        complaints += [f"shows {n_lines} lines; the limit is {OUTPUT_LINES}"] * (n_lines > OUTPUT_LINES)
        problems += [f"cell {place} ({code(cell).splitlines()[0][:40]}) {complaint}" for complaint in complaints]
    return [f"{Path(path).name} {problem}" for problem in problems]


def readme_problems(root) -> list:
    "README.md is the rendered index, and the files it links to are there."
    page = Path(root, "README.md").read_text(encoding="utf-8")
    targets = [re.sub("#.*", "", target) for target in re.findall(r"\]\(([^)\s]+)\)", page)]
    problems = [f"README.md links to {target}, which is not there" for target in targets
                if not re.match("[a-z]+:", target) and not Path(root, target).exists()]
    return problems + ["README.md differs from nbs/index.ipynb: run `make readme`"] * (
        page != render(read(Path(root, "nbs", "index.ipynb"))))


def n_words(prose, tables=True) -> int:
    "Words outside fenced code."
    prose = re.sub(r"```.*?```", "", prose, flags=re.S)
    lines = [line for line in prose.splitlines() if tables or not line.lstrip().startswith("|")]
    return len(re.findall(r"[\w`'’./%-]*\w[\w`'’./%-]*", "\n".join(lines)))


def n_lines(lines) -> int:
    "Lines that are not blank."
    return sum(bool(line.strip()) for line in lines)


def body_lines(function, lines) -> int:
    "The lines of a function's body below its docstring."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return n_lines(lines[body[0].lineno - 1:function.end_lineno]) if body else 0


def unused_definitions(notebook) -> tuple:
    "How many public definitions a chapter exports, and which of them no cell among the next three code cells uses."
    cells = [cell for _, cell in code_cells(notebook) if is_run(cell)]
    n_defined, unused = 0, []
    for i, cell in enumerate(cells):
        defined = [node.name for node in parse(cell).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                   and not node.name.startswith("_")] if is_exported(cell) else []
        near = [node for other in cells[i + 1:i + 1 + USED_WITHIN] for node in ast.walk(parse(other))]
        used = {getattr(node, "id", getattr(node, "attr", None)) for node in near}
        n_defined, unused = n_defined + len(defined), unused + [name for name in defined if name not in used]
    return n_defined, unused


def idle_imports(notebook) -> list:
    "Names that an exported cell imports and no cell of the chapter uses; in a comment or a text they may be used too."
    cells = [cell for _, cell in code_cells(notebook)]
    imports = [node for cell in cells if is_exported(cell) for node in ast.walk(parse(cell))
               if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__"]
    without = "\n".join(re.sub(r"(?m)^\s*(from [^\n]+ )?import [^\n(]*(\([^)]*\))?", "", code(cell)) for cell in cells)
    named = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    return sorted(name for name in named if not re.search(rf"\b{name}\b", without))


def cell_budget_problems(cell) -> list:
    "One cell keeps to its lines, columns and words."
    if cell["cell_type"] == "markdown":
        words = n_words(source(cell), tables=False)
        return [f"has {words} words; the limit is {PROSE_WORDS}"] if words > PROSE_WORDS else []
    lines = code(cell).splitlines()
    limit = EXPORTED_LINES if is_exported(cell) else CODE_LINES
    problems = [f"has {n_lines(lines)} lines; the limit is {limit}"] if n_lines(lines) > limit else []
    wide = max(map(len, lines))
    problems += [f"has a line of {wide} columns; the limit is {COLUMNS}"] * (wide > COLUMNS)
    for node in ast.walk(parse(cell)):
        if isinstance(node, ast.FunctionDef) and body_lines(node, lines) > BODY_LINES:
            problems.append(f"the body of `{node.name}` has {body_lines(node, lines)} lines; the limit is {BODY_LINES}")
    return problems


def budget_problems(path) -> list:
    "A chapter keeps to STYLE's budgets."
    notebook = read(path)
    filled = [(place, cell) for place, cell in enumerate(notebook["cells"]) if code(cell)]
    problems = [f"cell {place} ({code(cell).splitlines()[0][:40]}) {problem}"
                for place, cell in filled for problem in cell_budget_problems(cell)]
    title = next((source(cell) for cell in notebook["cells"] if source(cell).startswith("# ")), "")
    if not re.search(r"(?m)^> .*[.!?]$", title):
        problems.append("has no promise under its title, a line that begins with > and ends with a full stop")
    if len(notebook["cells"]) > CELLS:
        problems.append(f"has {len(notebook['cells'])} cells; the limit is {CELLS}")
    words = sum(n_words(source(cell)) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    lines = sum(n_lines(code(cell).splitlines()) for _, cell in code_cells(notebook) if "hide" not in directives(cell))
    if words < WORDS_PER_LINE * lines:
        problems.append(f"has {words / lines:.1f} words of prose for a line of code; {WORDS_PER_LINE} are the least")
    n_defined, unused = unused_definitions(notebook)
    if len(unused) > (1 - USED_SHARE) * n_defined:
        problems.append(f"uses too few definitions within {USED_WITHIN} cells; missed: {', '.join(unused)}")
    if idle_imports(notebook):
        problems.append(f"imports what it does not use: {', '.join(idle_imports(notebook))}")
    return [f"{Path(path).name} {problem}" for problem in problems]


def module_budget_problems(path) -> list:
    "A module keeps to its lines; nbdev's own lines don't count."
    module = Path(path).read_text(encoding="utf-8")
    own = re.sub(r"^(# %% |# AUTOGENERATED).*|^__all__ = \[[^]]*\]", "", module, flags=re.M)
    n = n_lines(own.splitlines())
    return [f"{Path(path).name} has {n} lines; the limit is {MODULE_LINES}"] if n > MODULE_LINES else []


def text_files(root) -> list:
    "The project's own text files."
    patterns = ("*.*", "Makefile", ".git[ai]*", ".ci/*", ".githooks/*", "nbs/*", "tests/**/*", "finetuning_kit/**/*")
    endings = {"", ".py", ".ipynb", ".md", ".ini", ".toml", ".txt", ".in", ".json", ".jsonl", ".csv", ".jinja"}
    found = {path for pattern in patterns for path in Path(root).glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix in endings)


def text_problems(root) -> list:
    "No leftovers, no paths of somebody's machine, no hosts of package registries, no overlong lines of Python."
    forbidden = {
        "a leftover": "TO" "DO|FIX" "ME|XX" "X\\b",
        "somebody's path": "(?<![\\w.])/(root|work|home/\\w+|Users/\\w+)/",
        "a registry's host": r"pypi\." r"org|pythonhosted\.org|npmjs\.(org|com)|pytorch\.org/whl|anaconda\.org",
        "an overlong line": rf"(?m)^.{{{COLUMNS + 1},}}$"}
    problems = []
    for path in text_files(root):
        page = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            page = "\n".join(source(cell) for cell in json.loads(page)["cells"])
        for what, pattern in forbidden.items():
            if what == "an overlong line" and (path.suffix != ".py" or path.parent.name == "finetuning_kit"):
                continue  # a module's lines are checked in its chapter; nbdev's list of names may be longer
            if match := re.search(pattern, page):
                problems.append(f"{path.relative_to(root)} holds {what}: {match[0]}")
    return problems
