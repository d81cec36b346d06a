"""The training application: config, data, model, trainer and launcher. It uses the library, never the reverse."""
