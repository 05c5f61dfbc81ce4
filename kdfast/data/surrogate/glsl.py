"""Fragment shaders of your own, rendered off screen: a folder of GLSL files to images.

Conventions that are understood, by what a file contains:

- ``mainImage``: Shadertoy, with ``iResolution``, ``iTime``, ``iMouse``, ``iFrame``, ``iTimeDelta``, ``iDate``;
- ``main``: GLSL Sandbox and TwiGL's classic, geek and geeker modes, with ``resolution``/``r``, ``time``/``t``,
  ``mouse``/``m``, ``FC``, writing ``gl_FragColor`` or an ``out vec4`` of their own;
- neither: the body of ``main``, as in TwiGL's geekest mode, writing ``o`` or ``gl_FragColor``.

Textures (``iChannel0`` to ``3``, ``backbuffer``/``b``) read as black.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.backend import triton_available
from kdfast.closing import Closing
from kdfast.data.surrogate.shaders import usable
from kdfast.errors import BackendError, DataError, require

SUFFIXES = (".frag", ".glsl", ".fs", ".fragment")
#: Successive frames of a shader lie this share of the whole time apart.
_GOLDEN = 0.6180339887498949
#: Where a shader is looked at before it is taken, and other times tried for a frame that shows nothing.
_TRIAL, _RETRIES = 64, 4

_VERTEX = "#version 330\nin vec2 corner;\nvoid main() { gl_Position = vec4(corner, 0.0, 1.0); }\n"
_UNIFORMS = {
    **{"resolution": "vec2", "mouse": "vec2", "time": "float", "frame": "float", "backbuffer": "sampler2D"},
    **{"iResolution": "vec3", "iMouse": "vec4", "iTime": "float", "iGlobalTime": "float", "iDate": "vec4"},
    **{"iTimeDelta": "float", "iFrame": "int", "iFrameRate": "float", "surfaceSize": "vec2"},
    **{f"iChannel{k}": "sampler2D" for k in range(4)},
}
#: TwiGL's names of one letter: too short to declare where a file may have variables of that name.
_SHORT = {"r": "vec2", "m": "vec2", "t": "float", "f": "float", "s": "float", "b": "sampler2D"}
#: What TwiGL lends its shorter modes; written from what the names promise.
_LIBRARY = {
    "PI": "const float PI = 3.141592653589793;",
    "PI2": "const float PI2 = 6.283185307179586;",
    "rotate2D": "mat2 rotate2D(float a) { return mat2(cos(a), sin(a), -sin(a), cos(a)); }",
    "hsv": (
        "vec3 hsv(float h, float s, float v) {"
        " return v * mix(vec3(1.0), clamp(abs(fract(h + vec3(0.0, 2.0, 1.0) / 3.0) * 6.0 - 3.0) - 1.0, 0.0, 1.0), s); }"
    ),
    "fsnoise": "float fsnoise(vec2 c) { return fract(sin(dot(c, vec2(12.9898, 78.233))) * 43758.5453); }",
}
_OUT = "kdfast_colour"


@dataclass(frozen=True)
class GLSLFault:
    """A file that is left out, and why.

    Attributes:
        file: Its name, relative to the folder.
        line: Where the driver found the first error; 0 if it named no line.
        message: The driver's words, or what the pictures lack.
    """

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


def _words(source: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", source))


def _without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), source, flags=re.S)


def _variables(code: str) -> set[str]:
    """Names that declarations like ``float a = 1.0, b;`` make, in time linear in the code's length."""
    found: set[str] = set()
    for match in re.finditer(r"\b(?:float|int|vec[234]|mat[234])\s+([^;(){}]{0,4096})", code):
        for part in match[1].split(","):
            if name := re.match(r"\s*(\w+)", part):
                found.add(name[1])
    return found


def translate(source: str) -> str:
    """A shader of one of the conventions as GLSL 3.30, with the line numbers of the original.

    Args:
        source: The file's text.

    Returns:
        A fragment shader whose colour is the output ``kdfast_colour``.
    """
    code = re.sub(r"^[ \t]*#version[^\n]*", "", _without_comments(source), flags=re.M)
    code = re.sub(r"\bprecision\s+\w+\s+\w+\s*;", "", code)
    code = re.sub(r"\b(?:varying|in)\s+vec2\s+(surfacePosition|vUv|v_texCoord)\s*;", "", code)
    code = re.sub(r"\btexture2D\b", "texture", code)
    code = re.sub(r"\bgl_FragColor\b|\bgl_FragData\s*\[\s*0\s*\]", _OUT, code)
    shadertoy, main = re.search(r"\bmainImage\s*\(", code), re.search(r"\bvoid\s+main\s*\(", code)
    body = not shadertoy and not main
    own = re.search(r"\bout\s+vec4\s+(\w+)\s*;", code)
    if own and not shadertoy:
        code = code.replace(own.group(), "") if own.group(1) == _OUT else code
    names, head = _words(code), ["#version 330"]
    if not (own and not shadertoy) or _OUT in names:
        head.append(f"out vec4 {_OUT};")
    uniforms = {**_UNIFORMS, **(_SHORT if body or not re.search(r"\buniform\b", code) else {})}
    declared = set(re.findall(r"\buniform\s+(?:\w+\s+)?\w+\s+(\w+)", code))
    # A one-letter name is a uniform only where the file does not make it a variable.
    made = _variables(code)
    for name, kind in uniforms.items():
        if name in names and name not in declared and not (name in _SHORT and name in made and not body):
            head.append(f"uniform {kind} {name};")
    head += [
        text
        for name, text in _LIBRARY.items()
        if name in names
        and not re.search(rf"\b{name}\s*\([^)]*\)\s*{{|#define\s+{name}\b|\bfloat\s+{name}\b", code)
    ]
    if "FC" in names:
        head.append("#define FC gl_FragCoord")
    if "surfacePosition" in names:
        head += ["uniform vec2 kdfast_size;", "#define surfacePosition (gl_FragCoord.xy / kdfast_size - 0.5)"]
    tail = ""
    if body:
        start = "vec4 o = vec4(0.0, 0.0, 0.0, 1.0);" if "o" in names else ""
        finish = f"{_OUT} = o;" if "o" in names else ""
        head.append(f"void main() {{ {_OUT} = vec4(0.0, 0.0, 0.0, 1.0); {start}")
        tail = f"\n;{finish} }}"
    elif shadertoy:
        tail = f"\nvoid main() {{ {_OUT} = vec4(0.0); mainImage({_OUT}, gl_FragCoord.xy); {_OUT}.a = 1.0; }}"
    return "\n".join([*head, "#line 1", code]) + tail + "\n"


class GLSLFolder(Closing):
    """A folder of fragment shaders, compiled; those that cannot be used are left out and listed.

    Example:
        >>> with GLSLFolder("my-shaders") as folder:                # doctest: +SKIP
        ...     images = folder.images(100, (224, 224))
        ...     print(*folder.faults, sep="\\n")

    Args:
        directory: Searched with its subfolders for ``.frag``, ``.glsl``, ``.fs`` and ``.fragment``.
        seconds: Frames are taken at times from 0 to here.

    Attributes:
        files: Names of the shaders in use, sorted.
        faults: One :class:`GLSLFault` a file left out: it does not compile, or shows nothing at any time tried.

    Raises:
        MissingExtraError: moderngl is not installed.
        BackendError: There is no EGL to render with.
        DataError: The folder does not exist, holds no shaders, or none that can be used.
    """

    def __init__(self, directory: str | os.PathLike[str], *, seconds: float = 10.0) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds: got {seconds}; must be positive")
        root = Path(directory)
        if not root.is_dir():
            raise DataError(f"{root}: does not exist, or is no folder")
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f"{root}: holds no shaders ({', '.join(SUFFIXES)})")
        self._gl = open_context()
        self._seconds = seconds
        corners = np.array([-1, -1, 3, -1, -1, 3], np.float32)  # one triangle that covers everything
        self._corners = self._gl.buffer(corners.tobytes())
        self._black = self._gl.texture((1, 1), 4, bytes((0, 0, 0, 255)))
        self._targets: dict[tuple[int, int], Any] = {}
        self._programs: list[Any] = []
        self._good: list[float] = []
        self.files: list[str] = []
        self.faults: list[GLSLFault] = []
        self._digests: list[str] = []
        for path in paths:
            self._take(path, path.relative_to(root).as_posix())
        if not self.files:
            shown = "; ".join(map(str, self.faults[:3]))
            self.close()
            raise DataError(f"{root}: none of {len(paths)} shaders can be used: {shown}")

    def images(self, n: int, shape: tuple[int, int], *, start: int = 0) -> torch.Tensor:
        """Images ``start`` to ``start + n``: image i is shader ``i mod F`` at a time that depends on ``i // F``.

        A frame that does not pass :func:`usable` is taken at another time.

        Returns:
            uint8 ``[n, 3, H, W]``, top row first.

        Raises:
            ValueError: An argument is out of range.
        """
        if n < 0 or start < 0:
            raise ValueError(f"n, start: got {n}, {start}; must be at least 0")
        if min(shape) < 1:
            raise ValueError(f"shape: got {shape}; must be positive")
        frames = [
            self._frame(i % len(self.files), i // len(self.files), shape) for i in range(start, start + n)
        ]
        return torch.stack(frames) if frames else torch.empty(0, 3, *shape, dtype=torch.uint8)

    def facts(self) -> dict[str, Any]:
        """What makes this folder's images these: kept in a set's manifest."""
        return {
            "files": dict(zip(self.files, self._digests, strict=True)),
            "seconds": self._seconds,
            "renderer": self._gl.info["GL_RENDERER"],
        }

    def close(self) -> None:
        """Give the renderer back."""
        self._gl.release()

    def _take(self, path: Path, name: str) -> None:
        error = require("moderngl", extra="shaders", feature="rendering GLSL").Error
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            program = self._gl.program(vertex_shader=_VERTEX, fragment_shader=translate(text))
        except OSError as problem:
            self.faults.append(GLSLFault(name, 0, str(problem)))
            return
        except error as problem:
            self.faults.append(_fault(name, str(problem)))
            return
        for moment in self._moments(0):
            if usable(self._draw(program, moment, (_TRIAL, _TRIAL))[None])[0]:
                self._programs.append(program)
                self._good.append(moment)
                self.files.append(name)
                self._digests.append(hashlib.sha256(text.encode()).hexdigest())
                return
        self.faults.append(
            GLSLFault(name, 0, f"shows nothing at {_RETRIES + 1} times from 0 to {self._seconds:g} s")
        )

    def _moments(self, frame: int) -> Sequence[float]:
        return [((frame + 0.37 * k) * _GOLDEN % 1.0) * self._seconds for k in range(_RETRIES + 1)]

    def _frame(self, shader: int, frame: int, shape: tuple[int, int]) -> torch.Tensor:
        picture = torch.empty(0)
        for moment in [*self._moments(frame), self._good[shader]]:
            picture = self._draw(self._programs[shader], moment, shape)
            if usable(picture[None])[0]:
                break
        return picture

    def _draw(self, program: Any, moment: float, shape: tuple[int, int]) -> torch.Tensor:
        height, width = shape
        if shape not in self._targets:
            self._targets[shape] = self._gl.framebuffer([self._gl.texture((width, height), 4)])
        values: dict[str, Any] = {
            **dict.fromkeys(("resolution", "r", "kdfast_size", "surfaceSize"), (float(width), float(height))),
            **dict.fromkeys(("mouse", "m"), (0.5, 0.5)),
            **dict.fromkeys(("time", "t", "iTime", "iGlobalTime"), moment),
            **dict.fromkeys(("frame", "f"), 60.0 * moment),
            "iResolution": (float(width), float(height), 1.0),
            "iMouse": (0.5 * width, 0.5 * height, 0.0, 0.0),
            "iFrame": int(60 * moment),
            "iTimeDelta": 1 / 60,
            "iFrameRate": 60.0,
            "iDate": (2000.0, 0.0, 1.0, moment),
        }
        for name, value in values.items():
            if name in program:
                program[name].value = value
        self._black.use(0)
        target = self._targets[shape]
        target.use()
        target.clear()
        quad = self._gl.vertex_array(program, [(self._corners, "2f", "corner")])
        quad.render()
        quad.release()
        pixels = np.frombuffer(target.read(components=3, alignment=1), np.uint8).reshape(height, width, 3)
        # OpenGL's first row is the lowest.
        return torch.from_numpy(pixels[::-1].transpose(2, 0, 1).copy())


def open_context() -> Any:
    """An OpenGL 3.3 context without a window.

    Raises:
        MissingExtraError: moderngl is not installed.
        BackendError: EGL is missing, or refuses.
    """
    moderngl = require("moderngl", extra="shaders", feature="rendering GLSL")
    if triton_available():
        # Triton and Mesa each bring an LLVM: loaded after Mesa's, Triton's ends the process.
        importlib.import_module("triton")
    try:
        return moderngl.create_context(standalone=True, backend="egl", require=330)
    except Exception as error:  # the loader raises whatever it likes
        raise BackendError(
            f"rendering GLSL needs EGL, which cannot be opened ({' '.join(str(error).split())[:160]}). On Debian and "
            "Ubuntu, without a GPU too: apt-get install libegl1 libgl1-mesa-dri"
        ) from error


def _fault(name: str, text: str) -> GLSLFault:
    """The driver's first error: Mesa writes ``0:LINE(COLUMN): error: …``, NVIDIA ``0(LINE) : error …``."""
    for line in text.splitlines():
        if "error" in line.lower() and (found := re.search(r"\b0[:(](\d+)", line)):
            message = re.sub(r"^.*?(?:error)\s*(?:C\d+)?\s*:\s*", "", line.strip())
            return GLSLFault(name, int(found.group(1)), message)
    return GLSLFault(name, 0, " ".join(text.split())[:300])
