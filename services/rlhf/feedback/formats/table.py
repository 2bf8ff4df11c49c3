"""Every format by its name: what `feedback.format` takes."""

from __future__ import annotations

from rlhf.errors import SettingsError
from rlhf.feedback.formats import (
    arena,
    argilla,
    helpsteer,
    hh,
    label_studio,
    lm_human_preferences,
    multipref,
    native,
    oasst,
    openai,
    openrlhf,
    tokenised,
    trl,
    ultrafeedback,
    webgpt,
)
from rlhf.feedback.formats.form import Format

FORMATS: dict[str, Format] = {
    "native": Format("one judgment a row with all its provenance", native.read, native.write),
    "trl": Format("TRL preference: prompt, chosen, rejected, margin", trl.read, trl.write_explicit),
    "trl-implicit": Format("TRL preference with the prompt inside", trl.read, trl.write_implicit),
    "trl-conversational": Format("TRL preference of messages", trl.read, trl.write_conversational),
    "trl-unpaired": Format("TRL unpaired: prompt, completion, label", write=trl.write_unpaired),
    "tokenised": Format("chosen_ids, rejected_ids, margin", write=tokenised.write),
    "openrlhf": Format("OpenRLHF, with its own names of keys", openrlhf.read, openrlhf.write),
    "hh": Format("Anthropic's HH-RLHF dialogues", hh.read, hh.write),
    "openai": Format("OpenAI summarize comparisons", openai.read, openai.write),
    "openai-axis": Format("OpenAI summarize axis evaluations", openai.read_axis, gather=openai.gather_axis),
    "lm-human-preferences": Format(
        "OpenAI lm-human-preferences: best, difference or score",
        lm_human_preferences.read,
        gather=lm_human_preferences.gather,
    ),
    "label-studio": Format("Label Studio tasks with a Ranker", label_studio.read, label_studio.write),
    "argilla": Format("Argilla records with a ranking question", argilla.read, argilla.write),
    "ultrafeedback": Format("UltraFeedback's raw scores", ultrafeedback.read_raw),
    "ultrafeedback-binarized": Format("UltraFeedback binarized by H4", ultrafeedback.read_binarized),
    "ultrafeedback-argilla": Format("UltraFeedback binarized by Argilla", ultrafeedback.read_argilla),
    "webgpt": Format("WebGPT comparisons", webgpt.read),
    "arena-55k": Format("Chatbot Arena's 55k preferences", arena.read_55k),
    "fastchat": Format("FastChat's arena battles", arena.read_battle),
    "oasst": Format("OpenAssistant trees or messages", oasst.read, gather=oasst.gather),
    "helpsteer2": Format("HelpSteer2-Preference", helpsteer.read_2),
    "helpsteer3": Format("HelpSteer3-Preference", helpsteer.read_3),
    "multipref": Format("MultiPref", multipref.read),
}


def format_named(name: str, *, to: str) -> Format:
    """
    Args:
        to: "read" or "write".

    Raises:
        SettingsError: there is none of this name, or it does not go this way.
    """
    able = [known for known, each in FORMATS.items() if getattr(each, to) is not None]
    if name not in able:
        raise SettingsError(
            f"feedback.format: {name!r} cannot be {'read' if to == 'read' else 'written'}; {_any(able)}"
        )
    return FORMATS[name]


def _any(names: list[str]) -> str:
    return f"there are {', '.join(names)}"
