"""GLSL folders: the conventions, the line of an error, pictures the right way up; without EGL, why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdfast.data.surrogate import glsl
from kdfast.data.surrogate.glsl import GLSLFolder, translate
from kdfast.errors import BackendError, DataError, MissingExtraError

#: One file a convention; all draw red from left to right, green from the bottom up, and blue by the time.
CONVENTIONS = {
    "shadertoy": """
        void mainImage(out vec4 fragColor, in vec2 fragCoord) {
            vec2 uv = fragCoord / iResolution.xy;
            fragColor = vec4(uv, 0.05 * iTime, 1.0) + 0.0 * texture(iChannel0, uv) * iMouse.x;
        }""",
    "sandbox": """
        #ifdef GL_ES
        precision mediump float;
        #endif
        uniform float time;
        uniform vec2 mouse;
        uniform vec2 resolution;
        uniform sampler2D backbuffer;
        void main(void) {
            vec2 p = gl_FragCoord.xy / resolution.xy;
            gl_FragColor = vec4(p, 0.05 * time, 1.0) + texture2D(backbuffer, p) * mouse.x * 0.0;
        }""",
    "classic300": """#version 300 es
        precision highp float;
        uniform vec2 resolution;
        uniform float time;
        out vec4 outColor;
        void main() { outColor = vec4(gl_FragCoord.xy / resolution, 0.05 * time, 1.0); }""",
    "geek": """
        precision highp float;
        uniform vec2 r;
        uniform float t;
        void main() { gl_FragColor = vec4(gl_FragCoord.xy / r, 0.05 * t, 1.0); }""",
    "geeker": "void main(){ vec2 p = FC.xy / r; gl_FragColor = vec4(p, t * .05, 1.); }",
    "geekest": "o = vec4(FC.xy / r, t * .05, 1.);",
    "geekest-loop": "for (float i = 0.; i < 2.; i++) o.rg += .5 * FC.xy / r; o.b = t * .05; // the end",
    "own-r": """
        uniform vec2 resolution;
        uniform float time;
        void main() {
            float r = gl_FragCoord.x / resolution.x, t = 0.05 * time;
            gl_FragColor = vec4(r, gl_FragCoord.y / resolution.y, t, 1.0);
        }""",
    "helpers": "vec3 c = hsv(.0, 1., 1.); mat2 m2 = rotate2D(PI2); o = vec4(FC.xy / r * c.r * m2[0][0], t * .05, 1.);",
}
BROKEN = "void main() {\n  gl_FragColor = vec4(1.0);\n  float x = nowhere;\n}\n"
FLAT = "void main() { gl_FragColor = vec4(0.3); }"


def has_egl() -> bool:
    try:
        glsl.open_context().release()
    except (BackendError, MissingExtraError):
        return False
    return True


needs_egl = pytest.mark.skipif(not has_egl(), reason="there is no EGL, or no moderngl")


def folder_of(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@needs_egl
def test_all_conventions_draw_the_same_picture_the_right_way_up(tmp_path: Path) -> None:
    with GLSLFolder(folder_of(tmp_path, {f"{k}.frag": v for k, v in CONVENTIONS.items()})) as folder:
        assert folder.faults == []
        assert folder.files == sorted(f"{name}.frag" for name in CONVENTIONS)
        images = folder.images(2 * len(CONVENTIONS), (20, 30))
    assert images.shape == (2 * len(CONVENTIONS), 3, 20, 30)
    first, later = images.split(len(CONVENTIONS))
    for name, image in zip(sorted(CONVENTIONS), first):
        assert int((image.int() - first[0].int()).abs().max()) <= 1, name
    # Red grows to the right, green upwards: the first row is the highest.
    across = (torch.arange(30) + 0.5) / 30
    up = 1 - (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(first[0, 0].float() / 255, across.expand(20, 30), atol=1 / 255, rtol=0)
    torch.testing.assert_close(first[0, 1].float() / 255, up[:, None].expand(20, 30), atol=1 / 255, rtol=0)
    # Frame 1 is 0.618 of ten seconds in.
    assert int(first[0, 2].max()) == 0
    assert abs(int(later[0, 2].max()) - 0.309 * 255) <= 1


@needs_egl
def test_what_does_not_compile_or_show_is_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    files = {"a/broken.frag": BROKEN, "flat.glsl": FLAT, "good.fs": CONVENTIONS["geeker"], "readme.txt": "no"}
    with GLSLFolder(folder_of(tmp_path, files)) as folder:
        assert folder.files == ["good.fs"]
        broken, flat = folder.faults
        assert (broken.file, broken.line) == ("a/broken.frag", 3)
        assert "nowhere" in broken.message
        assert str(broken).startswith("a/broken.frag:3: ")
        assert str(flat) == "flat.glsl: shows nothing at 5 times from 0 to 10 s"
        assert folder.images(2, (8, 8)).shape == (2, 3, 8, 8)


@needs_egl
def test_an_image_depends_on_its_number_alone(tmp_path: Path) -> None:
    files = {"one.frag": CONVENTIONS["geekest"], "two.frag": "o = vec4(fract(FC.xy / r * 3. + t), .5, 1.);"}
    with GLSLFolder(folder_of(tmp_path, files), seconds=3) as folder:
        whole = folder.images(7, (9, 12))
        assert torch.equal(whole[3:], folder.images(4, (9, 12), start=3))
        assert len({image.numpy().tobytes() for image in whole}) == 7
        assert folder.images(0, (9, 12)).shape == (0, 3, 9, 12)
        assert set(folder.facts()["files"]) == set(files)
    with GLSLFolder(tmp_path, seconds=6) as longer:
        assert not torch.equal(whole, longer.images(7, (9, 12)))


@needs_egl
def test_a_frame_that_shows_nothing_is_taken_at_another_time(tmp_path: Path) -> None:
    files = {"late.frag": "o = t < 5. ? vec4(0) : vec4(fract(FC.xy / r * 3.), .5, 1.);"}
    from kdfast.data.surrogate import usable

    with GLSLFolder(folder_of(tmp_path, files)) as folder:
        assert bool(usable(folder.images(6, (16, 16))).all())


@needs_egl
def test_what_is_imported_after_a_context_still_works() -> None:
    """Mesa's LLVM and Triton's share names: loaded in the wrong order they end the process."""
    code = (
        "from kdfast.data.surrogate import glsl; context = glsl.open_context(); import triton, torch._dynamo; "
        "context.release(); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-500:]


@needs_egl
@pytest.mark.parametrize(
    "files, match",
    [
        ({}, r"holds no shaders \(.frag"),
        (
            {"a.frag": BROKEN, "b.frag": FLAT},
            "none of 2 shaders can be used: a.frag:3: .*; b.frag: shows nothing",
        ),
    ],
)
def test_folders_without_a_usable_shader(tmp_path: Path, files: dict[str, str], match: str) -> None:
    with pytest.raises(DataError, match=match):
        GLSLFolder(folder_of(tmp_path, files))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist, or is no folder"):
        GLSLFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="seconds: got 0"):
        GLSLFolder(tmp_path, seconds=0)


@needs_egl
def test_sizes_that_make_no_sense(tmp_path: Path) -> None:
    with GLSLFolder(folder_of(tmp_path, {"a.frag": CONVENTIONS["geekest"]})) as folder:
        for call, match in (
            (lambda: folder.images(-1, (8, 8)), "n, start: got -1"),
            (lambda: folder.images(1, (8, 8), start=-1), "n, start"),
            (lambda: folder.images(1, (0, 8)), r"shape: got \(0, 8\)"),
        ):
            with pytest.raises(ValueError, match=match):
                call()


def test_without_egl_the_message_says_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moderngl = pytest.importorskip("moderngl")

    def refuse(**options: Any) -> None:
        raise Exception("libEGL.so: cannot open shared object file")

    monkeypatch.setattr(moderngl, "create_context", refuse)
    folder_of(tmp_path, {"a.frag": FLAT})
    with pytest.raises(BackendError, match=r"cannot open shared.*apt-get install libegl1 libgl1-mesa-dri"):
        GLSLFolder(tmp_path)


def test_translation_keeps_the_lines() -> None:
    text = (
        "#version 300 es\n/* a\nb */ precision highp float;\nvoid main() { gl_FragColor = vec4(1.0); } // end"
    )
    lines = translate(text).split("#line 1\n")[1].splitlines()
    assert [i for i, line in enumerate(lines, 1) if "void main" in line] == [4]
    assert "precision" not in "".join(lines)


@pytest.mark.parametrize(
    "log, line, message",
    [
        ("0:12(5): error: `x' undeclared\n0:13(1): error: later", 12, "`x' undeclared"),
        ("0(7) : error C1503: undefined variable", 7, "undefined variable"),
        ("the linker gave up", 0, "the linker gave up"),
    ],
)
def test_drivers_words_are_read(log: str, line: int, message: str) -> None:
    fault = glsl._fault("f.frag", log)
    assert (fault.line, fault.message) == (line, message)
