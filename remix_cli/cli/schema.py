"""`remix schema`."""

import json


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from remix_cli.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
