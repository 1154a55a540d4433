"""A conversation with one version, or with a mix of two: a question goes to the engine, its answer streams back."""

import json
from collections.abc import AsyncIterator

from rlhf.compare.arguments import BASE
from rlhf.data.dialogues import Unusable
from rlhf.data.prompt_format import PromptFormat
from rlhf.page.engine import Engine, Settings, Ticket
from rlhf.page.fields import BadField


class Chat:
    """Questions in the prompt format of the versions.

    names: versions that may be asked. defaults: sampling settings that the page begins with. room: tokens that fit
    into the base, question and answer together.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_format: PromptFormat,
        names: list[str],
        defaults: dict,
        room: int,
        has_reward: bool = False,
    ):
        self.engine = engine
        self.prompt_format = prompt_format
        self.names = names
        self.defaults = defaults
        self.room = room
        self.has_reward = has_reward

    def ask(self, fields: dict) -> tuple[Ticket, int]:
        """Put a question into the engine's queue; its ticket and seed. Raises: BadField where it does not fit."""
        settings = Settings(
            # A number of JSON may be whole, and transformers asks for a float.
            temperature=float(fields["temperature"]) or 1.0,
            top_p=float(fields["top_p"]),
            max_new_tokens=fields["max_new_tokens"],
            # Temperature 0 is greedy decoding, which is a setting of its own in the engine.
            do_sample=fields["temperature"] > 0,
        )
        query = self.encode(fields["turns"], settings.max_new_tokens)
        weights = weights_of(fields["version"])
        return self.engine.submit(weights, query, settings, fields["seed"]), fields["seed"]

    def encode(self, turns: list[tuple[str, str]], max_new_tokens: int) -> list[int]:
        """Token ids of a conversation. Raises: BadField where it is too long, or the template refuses it."""
        try:
            query = self.prompt_format.query_ids(turns)
        except Unusable as error:
            raise BadField(str(error)) from None
        # Answered as a sentence here; further down it would be an error of positions.
        if len(query) + max_new_tokens > self.room:
            raise BadField(
                f"the conversation has {len(query)} tokens, and with an answer of {max_new_tokens} it is longer than "
                f"the {self.room} of this base: begin a new one, or ask for fewer"
            )
        return query

    async def lines(self, ticket: Ticket, seed: int) -> AsyncIterator[str]:
        """Lines of JSON: {"text"} for each piece, and at the end how it ended, its length and its score."""
        try:
            async for piece in ticket.pieces():
                yield json.dumps({"text": piece}) + "\n"
            answer = await ticket.result()
            last = {"finish": answer.finish_reason, "tokens": len(answer.token_ids), "score": answer.score}
            yield json.dumps({**last, "whole": answer.text, "seed": seed}) + "\n"
        except (FloatingPointError, RuntimeError, ValueError, MemoryError) as error:
            # The answer has begun, so its status can say nothing any more.
            yield json.dumps({"error": " ".join(str(error).split())[:300]}) + "\n"
        finally:
            # A browser that stops, or goes away, frees its place at once.
            ticket.cancel()


def weights_of(version: str | dict[str, float]) -> str | dict[str, float]:
    """A version as the engine takes it: in a mix the base has no weights of its own, and its share is left out."""
    if isinstance(version, str):
        return version
    # The base is what the terms are added to, with weight 1 whatever its share.
    adapters = {name: weight for name, weight in version.items() if name != BASE and weight}
    return adapters or BASE
