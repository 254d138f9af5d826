"""The policies by name: every class with a name in the files of this folder."""

from importlib import import_module
from inspect import getmembers, isclass
from pkgutil import iter_modules

from sglang_tri.policies.base import Policy

POLICIES: dict[str, type[Policy]] = {
    member.name: member
    for module in iter_modules(__path__, f"{__name__}.")
    for _, member in getmembers(import_module(module.name), isclass)
    if issubclass(member, Policy) and "name" in vars(member)
}
