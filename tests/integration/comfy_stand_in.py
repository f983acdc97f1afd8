"""What ComfyUI's executor asks of nodes, as far as ours depend on it; not ComfyUI.

Links between nodes are typed and checked, widgets are checked by their options, `VALIDATE_INPUTS` sees the inputs that
it names, outputs are kept until an input, a link or `IS_CHANGED` differs, and everything runs in inference mode.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

WIDGETS = {"STRING": str, "INT": int, "FLOAT": (int, float), "BOOLEAN": bool}


class InterruptProcessingException(Exception):  # noqa: N818  its name there
    pass


class Comfy:
    """A graph is `{id: (class name, {input: value or ("link", id, output number)})}`."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.previews: list[tuple[int, int, Any]] = []
        self.cancel_after: int | None = None
        self.checks = 0
        self.kept: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.ran: list[str] = []
        management, utils, comfy = ModuleType("comfy.model_management"), ModuleType("comfy.utils"), ModuleType("comfy")
        management.throw_exception_if_processing_interrupted = self._check_cancelled
        utils.ProgressBar = lambda total, node_id=None: _Bar(self.previews)
        comfy.model_management, comfy.utils = management, utils
        for module in (comfy, management, utils):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        spec = importlib.util.spec_from_file_location("linked_nodes", folder / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.nodes, self.titles = dict(module.NODE_CLASS_MAPPINGS), module.NODE_DISPLAY_NAME_MAPPINGS

    def _check_cancelled(self) -> None:
        self.checks += 1
        if self.cancel_after is not None and self.checks > self.cancel_after:
            raise InterruptProcessingException

    def validate(self, graph: dict[str, tuple[str, dict[str, Any]]]) -> None:
        for name, inputs in graph.values():
            node = self.nodes[name]
            types = node.INPUT_TYPES()
            known = types["required"] | types.get("optional", {})
            missing, unknown = types["required"].keys() - inputs.keys(), inputs.keys() - known.keys()
            assert not missing | unknown, f"{name}: missing {missing}, unknown {unknown}"
            for key, value in inputs.items():
                kind, options = known[key][0], (*known[key], {})[1]
                if isinstance(value, tuple):
                    _, source, output = value
                    assert self.nodes[graph[source][0]].RETURN_TYPES[output] == kind, f"{name}.{key}: not a {kind}"
                elif isinstance(kind, list):
                    assert value in kind, f"{name}.{key}: {value!r} is not in the list"
                else:
                    assert isinstance(value, WIDGETS[kind]), f"{name}.{key}: {value!r} is no {kind}"
                    assert options.get("min", value) <= value <= options.get("max", value)
            if hasattr(node, "VALIDATE_INPUTS"):
                wanted = inspect.signature(node.VALIDATE_INPUTS).parameters
                answer = node.VALIDATE_INPUTS(**{key: inputs[key] for key in wanted if key in inputs})
                if answer is not True:
                    raise ValueError(answer)

    def execute(self, graph: dict[str, tuple[str, dict[str, Any]]], wanted: str) -> tuple[Any, ...]:
        """The outputs of node `wanted`; `ran` holds the ids of the nodes that had to run for it."""
        self.validate(graph)
        self.ran = []
        with torch.inference_mode():
            return self._outputs(graph, wanted)[1]

    def _outputs(self, graph, wanted: str) -> tuple[Any, tuple[Any, ...]]:
        name, inputs = graph[wanted]
        node, values, signature = self.nodes[name], {}, [name]
        for key, value in inputs.items():
            if isinstance(value, tuple):
                source, outputs = self._outputs(graph, value[1])
                values[key], value = outputs[value[2]], (*value, source)
            else:
                values[key] = value
            signature.append((key, value))
        if hasattr(node, "IS_CHANGED"):
            signature.append(node.IS_CHANGED(**values))
        kept = self.kept.get(wanted)
        if kept is None or kept[0] != signature:
            self.ran.append(wanted)
            kept = (signature, getattr(node(), node.FUNCTION)(**values))
            assert isinstance(kept[1], tuple)
            assert len(kept[1]) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
            self.kept[wanted] = kept
        return kept


class _Bar:
    def __init__(self, previews: list[tuple[int, int, Any]]) -> None:
        self.previews = previews

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.previews.append((value, total, preview))
