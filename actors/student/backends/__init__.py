"""Implementations of `actors.student.backend.StudentBackend`, one per file, selected by the settings in
`kdray.config.backends`."""
