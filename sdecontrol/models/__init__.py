"""Other people's models: diffusers and PEFT. They are imported when they are used."""
