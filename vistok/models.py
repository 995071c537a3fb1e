"""The shared base of all saved models: strict save and load on diffusers' mixins.

diffusers gives `from_pretrained`, `save_pretrained`, sharding, dtypes and the Hub; by default it
warns where a checkpoint does not fit. Here a missing, unexpected or misshapen tensor, an unknown
config key and a class of another kind are errors of one line. Class names found in a checkpoint are
looked up among vistok's own exports and the classes that a program has defined; none is ever
imported because a checkpoint names it.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

import vistok
from vistok.errors import CheckpointError, UserError, suggestion
from vistok.tokens import TokenSpec

__all__ = ["Component", "Model", "register_to_config"]

FORMAT = 1  # version of the files that `save_pretrained` writes
WEIGHTS = "diffusion_pytorch_model.safetensors"


def named(name: str, kind: type, where: str) -> type:
    """Return the class `name`, which must be a `kind`: vistok's, or one of the program's own that
    it has imported; raise `CheckpointError` otherwise."""
    own = [c for c in _subclasses(kind) if c.__name__ == name and not _is_inside(c)]
    if name in vistok.__all__:
        found = getattr(vistok, name)
    elif own:
        found = own[-1]  # a notebook's cell that runs again defines its class anew
    else:
        raise CheckpointError(
            f"{where}: class '{name}' is not part of vistok{suggestion(name, vistok.__all__)}; a "
            "class of your own is found once its module is imported"
        )
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise CheckpointError(f"{where}: holds a {name}, expected a {kind.__name__}")
    return found


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _is_inside(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "vistok"


def _to_plain(value: Any) -> Any:
    """Return the JSON form of a constructor argument."""
    if isinstance(value, Component):
        return {"_class_name": type(value).__name__, **value.arguments}
    if isinstance(value, TokenSpec):
        return {"_class_name": "TokenSpec", **value.to_dict()}
    if isinstance(value, list | tuple):
        return [_to_plain(v) for v in value]
    return value


def _from_plain(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_from_plain(v, where) for v in value]
    if not (isinstance(value, dict) and "_class_name" in value):
        return value
    fields = {k: v for k, v in value.items() if k != "_class_name"}
    if value["_class_name"] == "TokenSpec":
        return TokenSpec.from_dict(fields)
    return named(value["_class_name"], Component, where).from_config(fields)


def register_to_config(init: Callable) -> Callable:
    """Decorate a constructor so that its arguments, defaults included, become the config.

    Unlike diffusers' decorator of the same name it sees through `**arguments`: a subclass may pass
    those of its parent on without repeating them.
    """

    @functools.wraps(init)
    def recording(self, *args, **kwargs):
        arguments = {k: v for k, v in kwargs.items() if not k.startswith("_")}
        # A parent's constructor runs inside the child's: the child's arguments stand.
        if not hasattr(self, "_internal_dict"):
            signature = inspect.Signature(list(constructor_parameters(type(self)).values()))
            bound = signature.bind(self, *args, **arguments)
            bound.apply_defaults()
            private = {k: v for k, v in kwargs.items() if k.startswith("_")}
            named = {k: v for k, v in bound.arguments.items() if k != "self"}
            self.register_to_config(**private, **named)
        init(self, *args, **arguments)

    return recording


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return what a constructor takes; where it ends in `**arguments`, its parent's, too, but for
    those that the class settles itself."""
    found = dict(inspect.signature(cls.__init__).parameters)
    rest = [name for name, p in found.items() if p.kind is p.VAR_KEYWORD]
    if rest:
        del found[rest[0]]
        parent = next(base for base in cls.__mro__[1:] if base.__init__ is not cls.__init__)
        inherited = constructor_parameters(parent)
        found |= {
            name: p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inherited.items()
            if name not in found and name not in cls.settled
        }
    return found


class _Configured(ConfigMixin):
    """Records constructor arguments as JSON and rebuilds from them, refusing unknown ones."""

    config_name = "config.json"
    settled: tuple[str, ...] = ()  # arguments of the parent that a subclass does not offer

    def register_to_config(self, **arguments):
        super().register_to_config(**{k: _to_plain(v) for k, v in arguments.items()})

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        return set(constructor_parameters(input_class))

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments in JSON form."""
        return {k: v for k, v in self.config.items() if not k.startswith("_")}

    @classmethod
    def revive(cls, config: dict[str, Any], where: str) -> dict[str, Any]:
        """Return `config`, its parts built; raise `CheckpointError` for an unknown key or class."""
        if config.get("_format", FORMAT) > FORMAT:
            raise CheckpointError(
                f"{where}: written in format {config['_format']}, this vistok reads up to "
                f"{FORMAT}: upgrade vistok"
            )
        known = cls._get_init_keys(cls) - {"self"}
        for key in (k for k in config if not k.startswith("_")):
            if key not in known:
                raise CheckpointError(
                    f"{where}: {cls.__name__} has no argument '{key}'{suggestion(key, known)}"
                )
        return {k: _from_plain(v, where) for k, v in config.items()}

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict(cls.revive(config_dict, cls.__name__), **kwargs)


class Component(nn.Module, _Configured):
    """A configurable part of a model: a quantizer, a head. Saved inside the model's config."""


class Model(diffusers.ModelMixin, _Configured):
    """A model with `from_pretrained` and `save_pretrained`. Decorate constructors with
    `register_to_config`; arguments may be JSON values, a `TokenSpec` or a `Component`."""

    # diffusers' deprecated access to arguments as attributes would hide submodules of their names.
    __getattr__ = nn.Module.__getattr__

    # diffusers' walk through all modules at each call, which decoding would feel at every pass.
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "Model":
        """Load from a directory or a Hub repository (`subfolder=` inside it).

        Called on a base class, returns whichever subclass the checkpoint holds. Keyword
        arguments named like constructor arguments override the saved ones. Raises `CheckpointError`
        for a file that is missing, truncated, pickled, of another class, or that does not fit in
        every tensor and every key.
        """
        path = str(pretrained_model_name_or_path)
        where = f"{path}/{kwargs['subfolder']}" if kwargs.get("subfolder") else path
        name = cls.__name__
        try:
            hub = {k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "token")}
            config = cls.load_config(path, **hub)
            name = config.get("_class_name", "")
            model_class = named(name, cls, where)
            model_class.revive(config, where)
            load = super(Model, model_class).from_pretrained.__func__
            model, info = load(
                model_class, path, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except CheckpointError:
            raise
        except (
            OSError,
            safetensors.SafetensorError,
            json.JSONDecodeError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{where}: no readable vistok model ({_first_line(error)}); expected a directory "
                f"or Hub repository with {cls.config_name} and {WEIGHTS}"
            ) from error
        except (ValueError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{where}: does not fit {name}: {_first_line(error)}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                names = ", ".join(str(k) for k in sorted(info[problem])[:3])
                raise CheckpointError(
                    f"{where}: {len(info[problem])} {problem.replace('_keys', '')} tensor(s) for "
                    f"{name}: {names}"
                )
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write `config.json` and safetensors into `save_directory`."""
        self.register_to_config(_format=FORMAT)
        super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)

    def take_over(self, weights: dict[str, Tensor], source: str) -> None:
        """Load `weights`, which `source` names in the `UserError` raised if not all fit."""
        own = {(k, v.shape) for k, v in self.state_dict().items()}
        unfit = own ^ {(k, v.shape) for k, v in weights.items()}
        if unfit:
            raise UserError(
                f"{type(self).__name__} cannot start from this {source}: "
                f"{len(unfit)} tensor(s) do not fit, as {min(name for name, _ in unfit)}"
            )
        self.load_state_dict(weights)

    @torch.no_grad()
    def fingerprint(self) -> str:
        """SHA-256 over class, arguments and every tensor: equal exactly for equal models.

        Arguments at their defaults do not count, so that one which a later version adds leaves
        files and caches made before it valid.
        """
        digest = hashlib.sha256(type(self).__name__.encode())
        chosen = _chosen(type(self), self.arguments)
        digest.update(json.dumps(chosen, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()


def _chosen(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in JSON form that are not at their defaults, those of parts, too."""
    parameters = constructor_parameters(cls)
    chosen = {k: v for k, v in arguments.items() if v != _to_plain(parameters[k].default)}
    for key, value in chosen.items():
        name = value.get("_class_name", "TokenSpec") if isinstance(value, dict) else "TokenSpec"
        if name != "TokenSpec":
            part = {k: v for k, v in value.items() if k != "_class_name"}
            of_part = _chosen(named(name, Component, cls.__name__), part)
            chosen[key] = {"_class_name": name, **of_part}
    return chosen


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
