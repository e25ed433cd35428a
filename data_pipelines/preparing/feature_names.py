"""Which names features may have: those that tables of a model can have as well."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from embcomp.errors import DataError

_TAKEN = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile
    cpu cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state
    get_parameter get_submodule half ipu items keys load_state_dict modules mtia
    named_buffers named_children named_modules named_parameters parameters pop
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook
    requires_grad_ set_extra_state set_submodule share_memory state_dict to to_empty train
    training type update values xpu zero_grad
    _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl
    _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _get_backward_hooks _get_backward_pre_hooks _get_name
    _is_full_backward_hook _load_from_state_dict _load_state_dict_post_hooks
    _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules _named_members
    _non_persistent_buffers_set _parameters _register_load_state_dict_pre_hook
    _register_state_dict_hook _replicate_for_data_parallel _save_to_state_dict _slow_forward
    _state_dict_hooks _state_dict_pre_hooks _version _wrapped_call_impl
"""
"""Attributes of torch's ModuleDict, in which TorchRec keeps its tables by name."""


def check_names(categorical: Iterable[str], numeric: Iterable[str], way_out: str) -> None:
    """Raise a DataError when a model could not be built on features of these names.

    Args:
        way_out: how a feature gets another name in this format.
    """
    categorical = list(categorical)
    for name in [*categorical, *numeric]:
        if not name or any(unicodedata.category(character) == "Cc" for character in name):
            raise DataError(
                f"a feature is called {name!r}; names hold a character at least, and no control "
                f"characters; {way_out}"
            )
        if name.startswith("^") and name.endswith("$"):
            raise DataError(
                f"a feature is called {name!r}, which stands for a pattern of names from ^ to $; "
                f"{way_out}"
            )
    for name in categorical:
        if "." in name:
            raise DataError(
                f"the categorical feature {name!r} has a dot in its name, which tables of models "
                f"cannot have; {way_out}"
            )
        if name in _TAKEN.split() or (name.startswith("__") and name.endswith("__")):
            raise DataError(
                f"the categorical feature {name!r} has a name that torch keeps for itself; "
                f"{way_out}"
            )
