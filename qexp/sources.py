"""Where configs come from besides conf/: names of bits, the saved sweeps, and the folders of other packages."""

from __future__ import annotations

from importlib.metadata import entry_points

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.sources_registry import SourcesRegistry  # the one way to add a source from outside hydra_plugins
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from qexp.schema import COMMON_BITS, bits_of

SWEEPS = "sweeps"
SWEEP_PARTS = ("sweeps/case", "sweeps/stress")  # settings that sweeps are made of, no sweeps themselves
OF_OTHERS = ("search", "wandb")  # folders of sweeps/ that are no configs: spaces of qexp-search, sweeps of a W&B agent


class QexpSearchPath(SearchPathPlugin):
    """Add the names of bits, the saved sweeps and the config folders of other packages (entry points qexp.configs)."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them behind qexp's own."""
        search_path.append("qexp-bits", "qexp://bits")
        search_path.append("qexp-sweeps", "qexp-sweeps://qexp.sweeps")
        for entry in entry_points(group="qexp.configs"):
            search_path.append(f"qexp-{entry.name}", f"pkg://{entry.value}")


class BitsSource(ConfigSource):
    """The group ``bits``: 600 names of one pattern, read from the name instead of from 600 files."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of the search path entry."""
        return "qexp"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a name like bits/w4a4kv4 says."""
        node = bits_of(_below("bits", config_path) or "")
        assert node is not None
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(node), header={"package": None})

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group itself."""
        return config_path.strip("/") in ("", "bits")

    def is_config(self, config_path: str) -> bool:
        """Return whether this is a name of the pattern."""
        name = _below("bits", config_path)
        return name is not None and bits_of(name) is not None

    def available(self) -> bool:
        """Return True: the names are in this program."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names to show: the common ones."""
        if config_path.strip("/") == "bits" and results_filter in (None, ObjectType.CONFIG):
            return sorted(COMMON_BITS)
        return ["bits"] if not config_path.strip("/") and results_filter in (None, ObjectType.GROUP) else []


class SweepsSource(ConfigSource):
    """The group ``sweeps``: the files of sweeps/, which stands beside conf/ and travels as the package qexp.sweeps."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._files = ImportlibResourcesConfigSource(provider, f"pkg://{self.path}")

    @staticmethod
    def scheme() -> str:
        """Return the scheme of the search path entry."""
        return "qexp-sweeps"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a saved sweep."""
        return self._files.load_config(_below(SWEEPS, config_path) or "")

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group or one below it."""
        below = _saved(config_path)
        return config_path.strip("/") in ("", SWEEPS) or (below is not None and self._files.is_group(below))

    def is_config(self, config_path: str) -> bool:
        """Return whether this is a saved sweep."""
        below = _saved(config_path)
        return below is not None and self._files.is_config(below)

    def available(self) -> bool:
        """Return whether the package is there."""
        return self._files.available()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the saved sweeps, or the group itself at the top."""
        if config_path.strip("/"):
            found = self._files.list(_saved(config_path) or "", results_filter)
            return [name for name in found if name not in OF_OTHERS]
        return [SWEEPS] if results_filter in (None, ObjectType.GROUP) else []


def register() -> None:
    """Tell Hydra about the sources and where to look for them."""
    SourcesRegistry.instance().register(BitsSource)
    SourcesRegistry.instance().register(SweepsSource)
    Plugins.instance().register(QexpSearchPath)


def _saved(config_path: str) -> str | None:
    """Return the name of a saved sweep, None for what is none."""
    below = _below(SWEEPS, config_path)
    return None if below is None or below.split("/")[0] in OF_OTHERS else below


def _below(group: str, config_path: str) -> str | None:
    """Return ``name`` of ``group/name[.yaml]``, None for what is not in ``group``."""
    first, _, rest = config_path.strip("/").removesuffix(".yaml").partition("/")
    return rest if first == group and rest else None
