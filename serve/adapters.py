"""LoRA adapters that come and go while the server runs, for an operator who said from which folder.

A request names an adapter by `model`, as it names the model itself. Only folders below the operator's root are opened,
links followed first; one change is made at a time, between two steps of the engine.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from trine.serve.errors import ApiError, bad_request
from trine.serve.schemas import LoadAdapterBody, UnloadAdapterBody
from trine.serve.service import Service


class AdapterChanges:
    """Loads and unloads the adapters of one server; `root` is the only folder they may lie in."""

    def __init__(self, service: Service, root: Path) -> None:
        self._service, self._root = service, root.resolve()
        self._lock = asyncio.Lock()

    async def load(self, body: LoadAdapterBody) -> dict[str, str]:
        """Make an adapter known. Raises `ApiError` 400 for a name that is taken or a folder that cannot be used."""
        service, name = self._service, body.lora_name
        service.require()
        folder = self._inside(body.lora_path)
        async with self._lock:
            if name in (*service.settings.names, *service.adapters):
                raise bad_request(f"there is a model {name!r} already; choose another name", "lora_name")
            error = await service.link.load_adapter(name, str(folder))
            if error is not None:
                raise bad_request(error, "lora_path")
            service.adapters.append(name)
        return {"name": name, "status": "loaded"}

    async def unload(self, body: UnloadAdapterBody) -> dict[str, str]:
        """Forget an adapter. Raises `ApiError` 404 for an unknown one, 400 for one that a request is computed with."""
        service, name = self._service, body.lora_name
        service.require()
        async with self._lock:
            if name not in service.adapters:
                known = ", ".join(service.adapters) or "none"
                message = f"there is no adapter {name!r}; loaded: {known}"
                raise ApiError(404, message, param="lora_name", code="model_not_found")
            error = await service.link.unload_adapter(name)
            if error is not None:
                raise bad_request(error, "lora_name")
            service.adapters.remove(name)
        return {"name": name, "status": "unloaded"}

    def _inside(self, path: str) -> Path:
        """The folder, which must lie below the root, and not by a link that leads out of it."""
        try:
            folder = (self._root / path).resolve()
            is_inside = folder.is_relative_to(self._root)
        except (OSError, ValueError):  # a loop of links; a zero byte
            is_inside = False
        if not is_inside:
            raise bad_request(f"lora_path {path!r} lies outside the folder that adapters are loaded from", "lora_path")
        return folder
