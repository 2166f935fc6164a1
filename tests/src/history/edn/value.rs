//! The part of EDN that histories are written in: nil, integers, strings, keywords, vectors, maps, sets.

use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

/// A value of EDN.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Value {
    Nil,
    Int(i64),
    Str(String),
    /// Without its colon.
    Keyword(String),
    Vector(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Set(Vec<Value>),
}

impl Value {
    /// Reads the only value of a text.
    pub fn read(text: &str) -> Result<Value, String> {
        let mut reader = Reader { chars: text.chars().peekable() };
        let value = reader.value()?;
        reader.skip_space();
        match reader.chars.next() {
            None => Ok(value),
            Some(more) => Err(format!("there is {more:?} after the value")),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Nil => f.write_str("nil"),
            Value::Int(number) => number.fmt(f),
            Value::Str(text) => write!(f, "{}", Quoted(text)),
            Value::Keyword(name) => write!(f, ":{name}"),
            Value::Vector(_) => f.write_str("a vector"),
            Value::Map(_) => f.write_str("a map"),
            Value::Set(_) => f.write_str("a set"),
        }
    }
}

/// A text as a string of EDN.
pub(super) struct Quoted<'t>(pub &'t str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for char in self.0.chars() {
            match char {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                control if control.is_control() => write!(f, "\\u{:04x}", u32::from(control))?,
                plain => write!(f, "{plain}")?,
            }
        }
        f.write_str("\"")
    }
}

struct Reader<'t> {
    chars: Peekable<Chars<'t>>,
}

impl Reader<'_> {
    fn value(&mut self) -> Result<Value, String> {
        self.skip_space();
        match self.chars.next() {
            None => Err("the value is cut off".to_owned()),
            Some('[') => Ok(Value::Vector(self.until(']')?)),
            Some('{') => self.map(),
            Some('#') if self.chars.next_if_eq(&'{').is_some() => Ok(Value::Set(self.until('}')?)),
            Some('"') => self.string(),
            Some(':') => match self.word() {
                name if name.is_empty() => Err("a keyword has no name".to_owned()),
                name => Ok(Value::Keyword(name)),
            },
            Some(first) => {
                let word = format!("{first}{}", self.word());
                if word == "nil" {
                    return Ok(Value::Nil);
                }
                word.parse().map(Value::Int).map_err(|_| format!("{word:?} is not a value of a history"))
            }
        }
    }

    fn until(&mut self, end: char) -> Result<Vec<Value>, String> {
        let mut values = Vec::new();
        loop {
            self.skip_space();
            if self.chars.next_if_eq(&end).is_some() {
                return Ok(values);
            }
            values.push(self.value()?);
        }
    }

    fn map(&mut self) -> Result<Value, String> {
        let mut entries: Vec<(Value, Value)> = Vec::new();
        let mut values = self.until('}')?.into_iter();
        while let Some(key) = values.next() {
            let value = values.next().ok_or_else(|| format!("a map has no value for {key}"))?;
            entries.push((key, value));
        }
        Ok(Value::Map(entries))
    }

    fn string(&mut self) -> Result<Value, String> {
        let mut text = String::new();
        loop {
            match self.chars.next() {
                None => return Err("a string is cut off".to_owned()),
                Some('"') => return Ok(Value::Str(text)),
                Some('\\') => text.push(self.escaped()?),
                Some(plain) => text.push(plain),
            }
        }
    }

    fn escaped(&mut self) -> Result<char, String> {
        match self.chars.next() {
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some(same @ ('"' | '\\')) => Ok(same),
            Some('u') => {
                let digits: String = self.chars.by_ref().take(4).collect();
                let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
                code.ok_or_else(|| format!("\\u{digits} is not a character"))
            }
            other => Err(format!("a string has a wrong escape: {other:?}")),
        }
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        let part = |char: &char| !char.is_whitespace() && !",[]{}()\"".contains(*char);
        while let Some(char) = self.chars.next_if(part) {
            word.push(char);
        }
        word
    }

    fn skip_space(&mut self) {
        while self.chars.next_if(|char| char.is_whitespace() || *char == ',').is_some() {}
    }
}
