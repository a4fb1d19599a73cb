"""Implementations of `actors.student.backend.StudentBackend`, one a file, named by the settings in `kdray.config.backends`."""
