"""The commands, a class each: its fields are what it takes, its docstrings the help, and calling it does it.

A class imports what it needs where it is called: whoever asks for help, or makes a mistake, does not wait for torch.
"""

from __future__ import annotations

from typing import Annotated

from tyro.conf import subcommand

from cluster.commands.data import Check, Convert, Index, Preview, Quarantine, Stats
from cluster.commands.machines import Doctor, Manifest
from cluster.commands.models import Chat, Evaluate, Export, Serve
from cluster.commands.recipes import Plan, Recipes
from cluster.commands.runs import Logs, Status, Stop, Submit, Train
from cluster.commands.watching import Compare, Dashboard, Profile, Report, Watch

Command = (
    Annotated[Recipes, subcommand("recipes")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Logs, subcommand("logs")]
    | Annotated[Stop, subcommand("stop")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Index, subcommand("data index")]
    | Annotated[Check, subcommand("data check")]
    | Annotated[Stats, subcommand("data stats")]
    | Annotated[Preview, subcommand("data preview")]
    | Annotated[Quarantine, subcommand("data quarantine")]
    | Annotated[Convert, subcommand("data convert")]
    | Annotated[Evaluate, subcommand("eval")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Profile, subcommand("profile")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Dashboard, subcommand("dashboard")]
    | Annotated[Manifest, subcommand("manifest")]
    | Annotated[Doctor, subcommand("doctor")]
)
