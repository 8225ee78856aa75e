//! What the lab's own terminal shows and takes: a live view with keys when there is a terminal, else
//! plain lines and commands as words. It turns keys into commands and never acts on them.

use std::collections::VecDeque;
use std::io::{BufRead, IsTerminal};

use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::Print;
use crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen};
use futures::StreamExt;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row as TableRow, Table, TableState, Wrap};
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::mpsc;

use super::command::{Action, Command, Who};
use super::control::Answer as Told;
use super::view::{Column, Row, View};

/// Keys and lines that wait for the loop.
const INPUTS_LEN: usize = 32;
/// Spaces between two columns.
const GAP: u16 = 2;
/// Width of the mark in front of the selected member.
const MARK: u16 = 2;

const KEYS: &str = "1-9 select  k kill  s stop  r (re)start  p pause/resume  i isolate  h heal  \
                    a add  x remove  l lines to copy  q quit";

/// What comes from the terminal or from standard input.
pub(crate) enum Input {
    /// A key, or a new size.
    Event(Event),
    /// A line.
    Line(String),
}

/// The lab's face: a screen, or lines.
#[derive(Default)]
pub(crate) struct Front {
    screen: Option<Screen>,
}

struct Screen {
    terminal: DefaultTerminal,
    ui: Ui,
}

/// What the screen shows besides the members.
struct Ui {
    selected: usize,
    events: VecDeque<String>,
    message: Told,
    /// A text stands in place of the view, until the next key.
    has_page: bool,
    /// The member that a second `x` removes.
    armed: Option<u16>,
}

impl Front {
    /// Takes over the terminal when there is one and `plain` does not forbid it, and begins to
    /// read. Needs a runtime.
    ///
    /// # Errors
    /// A text for the user: the terminal cannot be used.
    pub(crate) fn open(&mut self, plain: bool) -> Result<mpsc::Receiver<Input>, String> {
        let (sender, inputs) = mpsc::channel(INPUTS_LEN);
        if plain || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
            read_lines(sender);
            return Ok(inputs);
        }
        let terminal =
            ratatui::try_init().map_err(|error| format!("cannot use the terminal: {error}"))?;
        let ui = Ui {
            selected: 0,
            events: VecDeque::new(),
            message: Ok(String::new()),
            has_page: false,
            armed: None,
        };
        self.screen = Some(Screen { terminal, ui });
        tokio::spawn(async move {
            let mut events = EventStream::new();
            while let Some(Ok(event)) = events.next().await {
                if sender.send(Input::Event(event)).await.is_err() {
                    return;
                }
            }
        });
        Ok(inputs)
    }

    /// Gives the terminal back.
    pub(crate) fn close(&mut self) {
        let Some(Screen { mut terminal, ui }) = self.screen.take() else { return };
        let shown = terminal.show_cursor();
        if ratatui::try_restore().and(shown).is_err() {
            // The terminal has gone away. Dropping this would complain to it, and fail at that.
            std::mem::forget(terminal);
        }
        if let Err(text) = ui.message {
            super::complain(&text);
        }
    }

    /// Whether there is a screen to draw.
    pub(crate) fn is_screen(&self) -> bool {
        self.screen.is_some()
    }

    /// Draws the screen, if there is one; false when its terminal has gone away.
    pub(crate) fn draw(&mut self, view: &View) -> bool {
        match &mut self.screen {
            Some(Screen { terminal, ui }) if !ui.has_page => {
                terminal.draw(|frame| ui.draw(frame, view)).is_ok()
            }
            _ => true,
        }
    }

    /// Shows the answer to a command that was given here.
    pub(crate) fn tell(&mut self, told: Told) {
        match (&mut self.screen, told) {
            (Some(screen), told) => screen.ui.message = told,
            (None, Ok(text)) => super::say(&text),
            (None, Err(text)) => super::say(&format!("error: {text}")),
        }
    }

    /// Shows a longer text that was asked for here.
    pub(crate) fn show(&mut self, text: String) {
        match &mut self.screen {
            Some(screen) => screen.open_page(&text),
            None => super::say(&text),
        }
    }

    /// Shows that something happened; the screen remembers the latest `max`.
    pub(crate) fn event(&mut self, line: String, max: usize) {
        match &mut self.screen {
            Some(Screen { ui, .. }) => {
                if ui.events.len() == max {
                    ui.events.pop_front();
                }
                ui.events.push_back(line);
            }
            None => super::say(&line),
        }
    }

    /// Notes a command given here among the events; where there are only lines, its answer is one.
    pub(crate) fn note(&mut self, line: String, max: usize) {
        if self.screen.is_some() {
            self.event(line, max);
        }
    }

    /// Turns input into a command, where it is one.
    pub(crate) fn take(&mut self, input: Input, view: &View) -> Option<Result<Command, String>> {
        match (input, &mut self.screen) {
            (Input::Line(line), _) if line.trim().is_empty() => None,
            (Input::Line(line), _) => Some(Command::parse(&line)),
            (Input::Event(Event::Key(key)), Some(screen)) if key.kind == KeyEventKind::Press => {
                if screen.ui.has_page {
                    screen.close_page();
                    return None;
                }
                screen.ui.key(key, view).map(Ok)
            }
            (Input::Event(_), _) => None,
        }
    }
}

/// Reads standard input line by line on a thread of its own; its end is not the lab's end.
fn read_lines(sender: mpsc::Sender<Input>) {
    // Reading the terminal from the background would stop the whole lab.
    let in_background = rustix::termios::tcgetpgrp(std::io::stdin())
        .is_ok_and(|group| group != rustix::process::getpgrp());
    if in_background {
        return;
    }
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(Input::Line(line)).is_err() {
                return;
            }
        }
    });
}

impl Screen {
    /// Shows a text on the ordinary screen behind the view: there the terminal itself breaks long
    /// lines, so that they are copied whole.
    fn open_page(&mut self, text: &str) {
        // Keys still come one by one, and the terminal does not return the cursor by itself.
        let text = format!("{text}\n(any key goes back)\n").replace('\n', "\r\n");
        let mut out = std::io::stdout();
        self.ui.has_page = crossterm::execute!(out, LeaveAlternateScreen, Print(text)).is_ok();
    }

    fn close_page(&mut self) {
        self.ui.has_page = false;
        // A terminal that has gone away sends a hangup, which ends the lab.
        let _gone = crossterm::execute!(std::io::stdout(), EnterAlternateScreen);
        // Only this makes the next drawing draw everything without asking the terminal for its
        // cursor, which would wait for an answer that the reader of keys takes away.
        let size = self.terminal.size().unwrap_or_default();
        let _gone = self.terminal.resize(Rect::from((Position::ORIGIN, size)));
    }
}

impl Ui {
    fn key(&mut self, key: KeyEvent, view: &View) -> Option<Command> {
        let armed = self.armed.take();
        self.message = Ok(String::new());
        let is_quit = key.code == KeyCode::Char('q')
            || (key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL));
        if is_quit {
            return Some(Command::Quit);
        }
        let count = view.members.len();
        let row = view.members.get(self.selected.min(count.saturating_sub(1)))?;
        let on = |action| Some(Command::On(action, Who::Number(row.number)));
        match key.code {
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down => self.selected = (self.selected + 1).min(count - 1),
            KeyCode::Char(digit @ '1'..='9') => {
                let number = digit.to_digit(10).and_then(|digit| u16::try_from(digit).ok());
                let found = view.members.iter().position(|row| Some(row.number) == number);
                self.selected = found.unwrap_or(self.selected);
            }
            KeyCode::Char('k') => return on(Action::Kill),
            KeyCode::Char('s') => return on(Action::Stop),
            KeyCode::Char('r') => return on(Action::Restart),
            KeyCode::Char('p') if row.state.starts_with("paused") => return on(Action::Resume),
            KeyCode::Char('p') => return on(Action::Pause),
            KeyCode::Char('i') => return on(Action::Isolate),
            KeyCode::Char('h') if row.isolated => {
                return Some(Command::Heal(Some(Who::Number(row.number))));
            }
            KeyCode::Char('h') => return Some(Command::Heal(None)),
            KeyCode::Char('a') => return Some(Command::Add { learner: false }),
            KeyCode::Char('l') => return Some(Command::Lines),
            KeyCode::Char('x') if armed == Some(row.number) => return on(Action::Remove),
            KeyCode::Char('x') => {
                self.armed = Some(row.number);
                self.message = Ok(format!("x again removes {} and deletes its data", row.name));
            }
            _ => {}
        }
        None
    }

    fn draw(&mut self, frame: &mut Frame, view: &View) {
        let rows = u16::try_from(view.members.len()).unwrap_or(u16::MAX).saturating_add(1);
        let [head, table, _, events, message, keys] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(rows),
            Constraint::Length(1),
            Constraint::Min(0),
            Constraint::Length(1),
            Constraint::Length(2),
        ])
        .areas(frame.area());
        let title = format!("kelson lab  {}", view.dir);
        let head_lines = vec![Line::from(title).bold(), Line::from(view.summary())];
        frame.render_widget(Paragraph::new(head_lines), head);
        self.draw_members(frame, view, table);
        let skip = self.events.len().saturating_sub(usize::from(events.height));
        let lines: Vec<Line> =
            self.events.iter().skip(skip).map(|event| Line::from(event.as_str())).collect();
        frame.render_widget(Paragraph::new(lines).dim(), events);
        let told = match &self.message {
            Ok(text) => Line::from(text.as_str()).green(),
            Err(text) => Line::from(text.as_str()).red(),
        };
        frame.render_widget(Paragraph::new(told), message);
        frame.render_widget(Paragraph::new(KEYS).dim().wrap(Wrap { trim: true }), keys);
    }

    fn draw_members(&mut self, frame: &mut Frame, view: &View, area: Rect) {
        self.selected = self.selected.min(view.members.len().saturating_sub(1));
        let columns = fitting(view.columns(), usize::from(area.width.saturating_sub(MARK)));
        let cell = |column: &Column, text: &str| {
            let width = column.width();
            if column.right { format!("{text:>width$}") } else { text.to_owned() }
        };
        let widths =
            columns.iter().map(|c| Constraint::Length(u16::try_from(c.width()).unwrap_or(0)));
        let head = TableRow::new(columns.iter().map(|column| cell(column, column.title)));
        let rows = view.members.iter().enumerate().map(|(index, member)| {
            let cells = columns.iter().map(|column| cell(column, &column.cells[index]));
            TableRow::new(cells.collect::<Vec<_>>()).style(style(member))
        });
        let table = Table::new(rows.collect::<Vec<_>>(), widths.collect::<Vec<_>>())
            .header(head.style(Style::new().add_modifier(Modifier::DIM)))
            .column_spacing(GAP)
            .highlight_symbol("> ");
        let mut state = TableState::default().with_selected(self.selected);
        frame.render_stateful_widget(table, area, &mut state);
    }
}

/// Leaves out the columns of highest rank until the rest fits into `width`.
fn fitting(mut columns: Vec<Column>, width: usize) -> Vec<Column> {
    let gap = usize::from(GAP);
    while columns.iter().map(|column| column.width() + gap).sum::<usize>() > width + gap {
        let Some(last) = columns.iter().map(|column| column.rank).max().filter(|rank| *rank > 0)
        else {
            break;
        };
        columns.retain(|column| column.rank != last);
    }
    columns
}

fn style(member: &Row) -> Style {
    let style = Style::new();
    match member {
        Row { pid: None, .. } => style.fg(Color::Red),
        Row { isolated: true, .. } => style.fg(Color::Yellow),
        Row { answers: false, .. } => style.fg(Color::Yellow),
        Row { role: Some("leader"), .. } => style.fg(Color::Green).add_modifier(Modifier::BOLD),
        _ => style.fg(Color::Green),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn ui() -> Ui {
        let (events, message) = (VecDeque::from(["10:00:00 m1 leads".to_owned()]), Ok("".into()));
        Ui { selected: 0, events, message, has_page: false, armed: None }
    }

    fn view() -> View {
        let row = |number: u16, role| Row {
            number,
            name: format!("m{number}"),
            pid: Some(100 + u32::from(number)),
            state: "running".into(),
            answers: true,
            role: Some(role),
            revision: Some(1_234_567),
            ..Row::default()
        };
        View { members: vec![row(1, "leader"), row(2, "follower")], ..View::default() }
    }

    fn drawn(ui: &mut Ui, width: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 12)).expect("a terminal");
        terminal.draw(|frame| ui.draw(frame, &view())).expect("drawn");
        terminal.backend().to_string()
    }

    fn press(ui: &mut Ui, code: KeyCode) -> Option<Command> {
        ui.key(KeyEvent::new(code, KeyModifiers::NONE), &view())
    }

    #[test]
    fn the_screen_shows_members_and_drops_columns_where_it_is_narrow() {
        let wide = drawn(&mut ui(), 140);
        for part in ["> m1", "leader", "1234567", "RSS", "10:00:00 m1 leads", "k kill"] {
            assert!(wide.contains(part), "{part}\n{wide}");
        }
        let narrow = drawn(&mut ui(), 60);
        assert!(narrow.contains("REVISION") && !narrow.contains("RSS"), "{narrow}");
    }

    #[test]
    fn keys_act_on_the_selected_member() {
        let mut ui = ui();
        let on = |action, number| Some(Command::On(action, Who::Number(number)));
        assert_eq!(press(&mut ui, KeyCode::Char('k')), on(Action::Kill, 1));
        assert_eq!(press(&mut ui, KeyCode::Char('2')), None);
        assert_eq!(press(&mut ui, KeyCode::Char('p')), on(Action::Pause, 2));
        assert_eq!(press(&mut ui, KeyCode::Up), None);
        assert_eq!(press(&mut ui, KeyCode::Char('i')), on(Action::Isolate, 1));
        assert_eq!(press(&mut ui, KeyCode::Char('9')), None);
        assert_eq!(press(&mut ui, KeyCode::Char('r')), on(Action::Restart, 1));
        assert_eq!(press(&mut ui, KeyCode::Char('q')), Some(Command::Quit));
    }

    #[test]
    fn removal_asks_twice() {
        let mut ui = ui();
        assert_eq!(press(&mut ui, KeyCode::Char('x')), None);
        assert_eq!(press(&mut ui, KeyCode::Down), None);
        assert_eq!(press(&mut ui, KeyCode::Char('x')), None, "another key lets go");
        assert!(press(&mut ui, KeyCode::Char('x')).is_some());
    }
}
