"""What leaves the repository: the source distribution, the wheel, and what installing them needs."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.house import leftovers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# One worker builds for all of them.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """What a build from a clean copy of the tree gives."""

    tree: Path
    sdist: Path
    wheel: Path
    site: Path
    log: str

    def names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def sdist_names(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            return Parser().parsestr(archive.read(name).decode())


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command away from the checkout, with no variable of the caller's that could find it again."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON", "KDFAST"))
    }
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def checked(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip_install(wheel: Path, target: Path) -> Path:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    checked(*install, "--target", target, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = tmp_path_factory.mktemp("packaging")
    tree = base / "tree"
    shutil.copytree(ROOT, tree, ignore=leftovers)
    # `build` makes the wheel from the unpacked sdist, so a file missing there is missing everywhere.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", base / "dist"]
    log = checked(*build, tree, cwd=base, KDFAST_REQUIRE_EXTENSION="1", CXXFLAGS="-O0")
    (sdist,) = (base / "dist").glob("*.tar.gz")
    (wheel,) = (base / "dist").glob("*.whl")
    return Built(tree, sdist, wheel, pip_install(wheel, base / "site"), log)


# An editable install finds in the checkout what the wheel lacks; here it must not.
NO_CHECKOUT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def python(site: Path, code: str, tmp_path: Path) -> str:
    """Run code against an installed wheel, in a folder that holds nothing."""
    program = NO_CHECKOUT + textwrap.dedent(code)
    return checked(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))


def test_sdist_carries_the_whole_tree(built: Built) -> None:
    tree = {str(path.relative_to(ROOT)) for path in sources(ROOT)}
    names = built.sdist_names()
    assert tree - names == set()
    assert {"csrc/bindings.cpp", "kernels/launch.py", "tests/conftest.py", "Makefile", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def sources(root: Path) -> Iterator[Path]:
    """The tree's files, the way a checkout has them."""
    for folder, directories, files in os.walk(root):
        ignored = leftovers(folder, [*directories, *files])
        directories[:] = [name for name in directories if name not in ignored]
        yield from (Path(folder, name) for name in files if name not in ignored)


def test_wheel_carries_the_package_and_nothing_else(built: Built) -> None:
    names = built.names()
    expected = {f"kdfast/{path.relative_to(ROOT / 'kdfast')}" for path in sources(ROOT / "kdfast")}
    expected |= {f"kdfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {
        f"kdfast/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")
    }
    assert expected - names == set()
    assert [name for name in names if re.fullmatch(r"kdfast/_C\..*\.(so|pyd)", name)]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kdfast"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_extension_is_compiled_to_travel(built: Built) -> None:
    """Optimised, rounding as the GPU does, for no particular machine."""
    compiled = [line for line in built.log.splitlines() if "bindings.cpp" in line and " -c " in line]
    assert compiled, built.log
    for line in compiled:
        assert {"-std=c++17", "-O3", "-ffp-contract=off"} <= set(line.split())
        assert "-march" not in line
        assert "-mtune" not in line


def test_wheel_metadata(built: Built) -> None:
    fields = built.metadata()
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.10"
    requirements = [Requirement(text) for text in fields.get_all("Requires-Dist", [])]
    core = {item.name for item in requirements if "extra" not in str(item.marker)}
    assert core == {"torch", "numpy", "triton"}
    extras = set(fields.get_all("Provides-Extra", []))
    assert {
        "diffusion",
        "train",
        "dali",
        "dali-cu12",
        "shaders",
        "models",
        "report",
        "profile",
        "all",
        "bench",
        "dev",
    } <= extras


def test_wheel_works_without_the_checkout(built: Built, tmp_path: Path) -> None:
    out = python(
        built.site,
        """
        import importlib.resources, json, sys
        import torch
        import kdfast, kdfast._C, kdfast.kernels, kdfast.functional
        torch.manual_seed(0)
        loss = kdfast.functional.kd_kl_div(torch.randn(4, 10), torch.randn(4, 10), 4.0)
        recipes = [path.name for path in importlib.resources.files("kdfast.recipes").iterdir()]
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "kdfast"]
        files = [module.__file__ for module in modules if getattr(module, "__file__", None)]
        got = {"loss": loss.item(), "recipes": recipes, "files": files, "extension": kdfast._C.__doc__}
        print(json.dumps(got))
        """,
        tmp_path,
    )
    got = json.loads(out)
    assert got["loss"] > 0
    assert got["extension"]
    assert got["recipes"]
    assert [name for name in got["files"] if not name.startswith(str(built.site))] == []


def test_console_script_is_installed(built: Built, tmp_path: Path) -> None:
    script = built.site / "bin" / "kdfast"
    assert "kdfast" in script.read_text()
    checked(script, "--help", cwd=tmp_path, PYTHONPATH=str(built.site))


# Torch's own requirements come with torch; everything else is somebody's extra, Triton included.
ALONE = '''
import importlib.metadata, re, sys

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def closure(name, seen):
    for text in importlib.metadata.requires(name) or []:
        required = normal(re.match(r"[\\w.-]+", text)[0])
        if "extra ==" not in text and required not in seen:
            try:
                importlib.metadata.distribution(required)
            except importlib.metadata.PackageNotFoundError:
                continue
            seen.add(required)
            closure(required, seen)
    return seen

allowed = closure("torch", {"torch", "numpy"}) - {"triton"}
owners = importlib.metadata.packages_distributions()
names = {module for module, dists in owners.items() if allowed & {normal(dist) for dist in dists}}
names |= {"torch", "functorch", "torchgen", "numpy", "kdfast", *sys.stdlib_module_names}

class Only:
    """A finder that does not find what is not allowed: as if it were not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.split(".")[0] in names else None

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Only, sys.meta_path)
'''


def test_the_core_needs_torch_and_numpy_alone(built: Built, tmp_path: Path) -> None:
    """`import kdfast`, the loss and its gradient, beside nothing but torch and numpy."""
    out = python(
        built.site,
        ALONE
        + textwrap.dedent(
            """
            try:
                import triton
            except ModuleNotFoundError:
                pass
            else:
                raise SystemExit("triton was not hidden")
            import torch, torch.nn.functional as F
            import kdfast
            torch.manual_seed(0)
            student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
            loss = kdfast.functional.kd_kl_div(student, teacher, 4.0)
            (grad,) = torch.autograd.grad(loss, student)
            q, p = F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1)
            want = F.kl_div(q, p, reduction="batchmean") * 16
            (want_grad,) = torch.autograd.grad(want, student)
            torch.testing.assert_close(loss, want)
            torch.testing.assert_close(grad, want_grad)
            torch.testing.assert_close(kdfast.nn.KDLoss(temperature=4.0)(student, teacher), want)
            print("ok")
            """
        ),
        tmp_path,
    )
    assert out.strip() == "ok"


def test_every_module_works_alone_or_names_its_extra(built: Built, tmp_path: Path) -> None:
    """With torch and numpy alone no module fails but by saying which extra it wants; none needs Triton."""
    out = python(
        built.site,
        ALONE
        + textwrap.dedent(
            """
            import importlib, pkgutil
            import kdfast
            # What stands behind the command, which has the say about its own extra.
            behind = ("kdfast.kernels", "kdfast._C", "kdfast.cli.", "kdfast.experiments.")
            count = 0
            for info in pkgutil.walk_packages(kdfast.__path__, "kdfast."):
                if info.name.startswith(behind):
                    continue
                count += 1
                try:
                    importlib.import_module(info.name)
                except kdfast.MissingExtraError as error:
                    if 'pip install "kdfast[' not in str(error):
                        print(info.name, error)
                except Exception as error:
                    print(info.name, repr(error))
            print(count)
            """
        ),
        tmp_path,
    )
    *wrong, count = out.splitlines()
    assert wrong == []
    assert int(count) >= 15


def test_the_command_alone_names_its_extra(built: Built, tmp_path: Path) -> None:
    code = ALONE + "from kdfast.cli import main\nmain(['doctor'])\n"
    result = run(sys.executable, "-c", NO_CHECKOUT + code, cwd=tmp_path, PYTHONPATH=str(built.site))
    assert result.returncode == 0, result.stderr
    assert "The core works." in result.stdout
    assert result.stdout.count("pip install") == 1
    code = ALONE + "from kdfast.cli import main\nmain(['teach'])\n"
    result = run(sys.executable, "-c", NO_CHECKOUT + code, cwd=tmp_path, PYTHONPATH=str(built.site))
    assert result.returncode == 1
    assert 'pip install "kdfast[train]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_import_is_quick_and_pulls_in_nothing(built: Built, tmp_path: Path) -> None:
    """Beside torch, `import kdfast` loads a handful of its own modules, and no optional package."""
    code = """
    import json, sys
    import torch
    before = set(sys.modules)
    import kdfast
    print(json.dumps(sorted(set(sys.modules) - before)))
    """
    loaded = json.loads(python(built.site, code, tmp_path))
    assert {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) == {"kdfast"}
    assert (
        len(loaded) <= 10
    )  # kdfast and kdfast.errors; time would depend on the machine and on who else uses it


def lint_imports(site: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    config = ["--no-cache", "--config", ROOT / "pyproject.toml"]
    return run(sys.executable, "-c", script, *config, cwd=site, PYTHONPATH=str(site))


def test_imports_run_downwards(built: Built) -> None:
    result = lint_imports(built.site)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors.py", "import kdfast.backend"),
        ("kernels/launch.py", "import kdfast.reference"),
        ("data/__init__.py", "import kdfast.replay"),
    ],
)
def test_an_import_that_runs_upwards_is_seen(built: Built, tmp_path: Path, module: str, line: str) -> None:
    """The contracts hold something: each kind of wrong import breaks them, in `kernels/` too."""
    shutil.copytree(built.site / "kdfast", tmp_path / "kdfast")
    path = tmp_path / "kdfast" / module
    path.write_text(path.read_text() + f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


def test_without_a_compiler_everything_but_replay_installs(built: Built, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(built.tree, tree, ignore=leftovers)
    wheel = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", tree]
    result = run(*wheel, cwd=tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "install a C++17 compiler" in result.stdout + result.stderr
    site = pip_install(next((tmp_path / "dist").glob("*.whl")), tmp_path / "site")
    code = """
    import torch, kdfast
    kdfast.functional.kd_kl_div(torch.zeros(2, 3), torch.ones(2, 3))
    try:
        from kdfast.replay import PrioritizedReplayBuffer
        PrioritizedReplayBuffer(4, (3,))
    except kdfast.KDFastError as error:
        print(error)
    """
    assert "compiler" in python(site, code, tmp_path)


def test_a_required_extension_that_does_not_build_is_an_error(built: Built, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(built.tree, tree, ignore=leftovers)
    wheel = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", tree]
    result = run(*wheel, cwd=tmp_path, CXX=str(tmp_path / "no-such-compiler"), KDFAST_REQUIRE_EXTENSION="1")
    assert result.returncode != 0


def test_editable_install_maps_kernels_and_recipes() -> None:
    # A build leaves an egg-info in the tree, which is a distribution of the same name.
    origins = [found.read_text("direct_url.json") for found in metadata.distributions(name="kdfast")]
    if not any(json.loads(text).get("dir_info", {}).get("editable") for text in origins if text):
        pytest.skip("kdfast is not installed editable here")
    for package, folder in (("kdfast.kernels", "kernels"), ("kdfast.recipes", "recipes")):
        assert [Path(path).resolve() for path in importlib.import_module(package).__path__] == [ROOT / folder]


class TestRequirements:
    """pyproject.toml and the constraints file say the same."""

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    constraints = (ROOT / "tests" / "constraints.txt").read_text()

    def closure(self, *extras: str) -> set[str]:
        """The packages that extras name, followed through kdfast's own extras."""
        names: set[str] = set()
        for extra in extras:
            for requirement in map(Requirement, self.project["project"]["optional-dependencies"][extra]):
                if requirement.name == "kdfast":
                    names |= self.closure(*requirement.extras)
                else:
                    names.add(canonicalize_name(requirement.name))
        return names

    def test_make_installs_nothing_that_cannot_run_beside_the_cpu_build(self) -> None:
        assert self.closure("all", "dev").isdisjoint({"torch", "torchvision", "timm", "torchrl"})

    def test_dev_brings_what_the_build_needs(self) -> None:
        needed = {
            canonicalize_name(Requirement(text).name) for text in self.project["build-system"]["requires"]
        }
        assert "torch" not in needed
        assert needed <= self.closure("dev")

    def test_all_is_everything_but_what_is_large_or_another_build(self) -> None:
        optional = set(self.project["project"]["optional-dependencies"]) - {
            "models",
            "export",
            "trainers",
            "dali-cu12",
            "bench",
            "docs",
            "dev",
            "all",
        }
        assert self.closure("all") == self.closure(*optional)

    def test_everything_that_tests_install_is_pinned(self) -> None:
        lines = [line for line in self.constraints.splitlines() if line and not line.startswith("#")]
        pinned = {canonicalize_name(Requirement(line).name) for line in lines}
        assert all("==" in line for line in lines)
        assert self.closure("all", "dev") | {"torch", "triton", "numpy"} <= pinned


class TestMakefile:
    """Stamps decide what is installed: nothing the second time, again when a requirement has changed."""

    def environment(self, tmp_path: Path, *, newer: bool) -> str:
        venv = tmp_path / "venv"
        venv.mkdir()
        # Older than all of them: the newest may be a file that the stamps do not depend on.
        moment = (max if newer else min)(path.stat().st_mtime for path in sources(ROOT))
        for offset, name in enumerate([".torch-installed", "constraints.txt", ".kdfast-installed"]):
            (venv / name).touch()
            when = moment + offset + (60 if newer else -3600)
            os.utime(venv / name, (when, when))
        return f"VENV={venv}"

    @pytest.mark.parametrize("target", ["test", "demo"])
    def test_second_run_installs_nothing(self, tmp_path: Path, target: str) -> None:
        plan = checked("make", "-n", target, self.environment(tmp_path, newer=True), cwd=ROOT)
        assert "pip" not in plan
        assert "kdfast demo" in plan or "pytest" in plan

    @pytest.mark.parametrize("target", ["test", "demo"])
    def test_first_run_installs_torch_alone_then_the_rest(self, tmp_path: Path, target: str) -> None:
        plan = checked("make", "-n", target, f"VENV={tmp_path / 'venv'}", cwd=ROOT)
        installs = [line for line in plan.splitlines() if "pip --quiet install" in line]
        torch = next(index for index, line in enumerate(installs) if line.endswith("install torch==2.13.0"))
        assert [index for index, line in enumerate(installs) if "-e '.[all,dev]'" in line] > [torch]

    def test_changed_dependencies_install_again(self, tmp_path: Path) -> None:
        plan = checked("make", "-n", "test", self.environment(tmp_path, newer=False), cwd=ROOT)
        assert "pip" in plan

    def test_help_lists_the_targets(self) -> None:
        text = checked("make", "help", cwd=ROOT)
        for target in ("demo", "test", "test-all", "sanitize", "lint", "docs", "bench", "clean"):
            assert f"make {target} " in text
