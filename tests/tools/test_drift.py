"""The lock describes the installed vLLM, and the tool finds a release's changes."""

import json
from pathlib import Path

import pytest

from tools.drift import LOCK, Sources, compare, dependencies, describe, installed
from vitcop_vllm.plugin import installed_vllm_version

OLD = {
    "__init__.py": "",
    "core.py": """
from vllm.base import Base

class Manager(Base):
    def free(self, request):
        '''Give the blocks back.'''
        return request

def cdiv(a: int, b: int) -> int:
    return -(-a // b)
""",
    "base.py": """
class Base:
    def touch(self, blocks): return blocks
    enabled = True
""",
    "lazy.py": "NAMES = {'LLM': '.core:Manager'}\ndef __getattr__(name): return NAMES[name]\n",
}
DEPENDS = {
    "imports": [
        ("vllm.core:cdiv",),
        ("vllm.core:Base",),
        ("vllm.lazy:LLM",),
        ("vllm.core:core",),
        ("vllm.new:name", "vllm.base:Base"),
    ],
    "overrides": [("ours.Manager.free", "vllm.core:Manager.free")],
    "calls": [("ours.Manager", "vllm.core:Manager.touch")],
    "names": ["enabled", "elsewhere"],
}


@pytest.fixture
def release(tmp_path):
    def release(**changed: str) -> Sources:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        for name, text in {**OLD, **{f"{k}.py": v for k, v in changed.items()}}.items():
            (folder / "vllm").mkdir(parents=True, exist_ok=True)
            (folder / "vllm" / name).write_text(text)
        return Sources(folder)

    return release


def test_the_lock_describes_the_installed_vllm():
    """If this fails after a change of our code, run python -m tools.drift --write."""
    if not installed_vllm_version().startswith("0.32."):
        pytest.skip("the lock describes vLLM 0.32")
    assert json.loads(LOCK.read_text()) == describe(dependencies(), installed())


def test_our_dependencies_are_found():
    depends = dependencies()
    imports = {place for places in depends["imports"] for place in places}
    assert "vllm.v1.core.sched.scheduler:Scheduler" in imports
    overrides = dict(depends["overrides"])
    for ours, theirs in {
        "vitcop_vllm.engine.scheduler.StagedScheduler.schedule": "sched.scheduler:Scheduler",
        # A mixin: only the class that mixes it in has the base.
        "vitcop_server.serving.PrunedChat.create_chat_completion": "serving:OpenAIServingChat",
        # A class made for each attention backend.
        "vitcop_vllm.engine.attention.StagedImpl.forward": "attn:",
    }.items():
        assert theirs in overrides[ours]


def test_calls_of_a_mixin_are_those_of_every_class_that_mixes_it_in():
    called = {
        method
        for caller, method in dependencies()["calls"]
        if caller == "vitcop_vllm.models.qwen_vl.QwenProcessingInfo"
    }
    models = "vllm.model_executor.models"
    assert f"{models}.qwen2_vl:Qwen2VLProcessingInfo._get_vision_info" in called
    assert f"{models}.qwen3_vl:Qwen3VLProcessingInfo._get_vision_info" in called


def test_new_docstrings_are_no_change(release):
    old = describe(DEPENDS, release())
    assert [*old["imports"]] == [
        "vllm.core:cdiv",
        "vllm.core:Base",
        "vllm.lazy:LLM",
        "vllm.new:name or vllm.base:Base",
    ]
    assert old["names"] == {"enabled": ""}
    reworded = OLD["core.py"].replace("Give the blocks back.", "Free the blocks.")
    assert compare(old, describe(DEPENDS, release(core=reworded))) == ([], [])


@pytest.mark.parametrize(
    ("module", "before", "after", "gone", "changed"),
    [
        ("core", "def cdiv", "def ceil", "import    vllm.core:cdiv", None),
        ("core", "def free", "def release", "override  ours.Manager.free", None),
        ("base", "def touch", "def reach", "call      ours.Manager of", None),
        ("base", "enabled", "is_on", "name      enabled", None),
        ("lazy", "LLM", "Engine", "import    vllm.lazy:LLM", None),
        ("core", "a: int, b: int", "a: int, *, by: int", None, "a, b -> a, *, by"),
        ("core", "self, request)", "self, request, last)", None, "request, last) "),
        ("core", "return request", "return None", None, "vllm.core:Manager.free: body"),
        ("base", "blocks): return", "blocks): yield", None, "vllm.core:Manager.touch: body"),
    ],
)
def test_a_change_is_found(release, module, before, after, gone, changed):
    text = OLD[f"{module}.py"]
    assert before in text
    new = release(**{module: text.replace(before, after)})
    lines = compare(describe(DEPENDS, release()), describe(DEPENDS, new))
    for wanted, found in zip((gone, changed), lines, strict=True):
        if wanted is None:
            assert not found
        else:
            assert len(found) == 1
            assert wanted in found[0]


def test_a_name_may_move_to_an_alternative_place(release):
    old = describe(DEPENDS, release())
    moved = release(new="name = 1", base=OLD["base.py"] + "class Other: ...")
    assert compare(old, describe(DEPENDS, moved)) == ([], [])


def test_relative_imports_are_followed(tmp_path: Path):
    package = tmp_path / "vllm" / "inner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .core import Manager\nfrom .. import top\n")
    (package / "core.py").write_text("class Manager:\n    def free(self, x): ...\n")
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "top.py").write_text("")
    vllm = Sources(tmp_path)
    assert vllm.find_method("vllm.inner", "Manager", "free") is not None
    assert vllm.find("vllm.inner", "top") is not None
    assert vllm.find("vllm.inner", "bottom") is None
